"""Upload closed segments to the remote storage root, and report until when this node's logs are complete there.

A segment goes through these steps, each of which can be repeated after a kill:

1. it is sealed: its writer gets no more chunks into the ledger's database;
2. its file is created below the storage root with one request, which never overwrites another file;
3. the file is read again and compared;
4. its chunks are removed from the database;
5. its file is removed from this machine's disk.

Two uploaders of one segment write the same content, so the second one finds step 2 done. An uploader has no key: it
moves encrypted lines. It also uploads the segments of nodes that report nothing any more, as far as the database has
them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import RecordLogCorrupt
from cluster.ledger import Ledger
from cluster.records.chunks import SILENT_S, abandoned_segments, remove_chunks, seal, segment_sizes
from cluster.records.compaction import adopt_local_table, remove_unfinished
from cluster.records.contents import shared_uri
from cluster.records.database import ensure_tables
from cluster.records.location import KINDS, LogLocation, local_node, location_at
from cluster.records.progress import report
from cluster.records.segments import SUFFIX, list_segments
from cluster.storage import Layout, create_bytes, read_bytes

LOG = logging.getLogger("falaj.uploader")
_NAME_TIME = "%Y%m%dT%H%M%S"
_BEGINNING = dt.datetime.fromtimestamp(0, dt.UTC)


@dataclass(kw_only=True, slots=True)
class UploadRound:
    """What one look at all logs did."""

    uploaded: int = 0
    failures: list[str] = field(default_factory=list)
    """One message for each segment or log that could not be uploaded. The next round tries again."""


class Uploader:
    """Uploads the segments of one node.

    Args:
        places: The folders of the state. The storage root must be remote.
        ledger: Its database holds chunks and progress.
        silent_s: Seconds after which the segments of a silent node are uploaded by this one.
    """

    def __init__(self, places: Layout, ledger: Ledger, *, silent_s: float = SILENT_S) -> None:
        self._places, self._engine, self._silent_s = places, ledger.engine, silent_s
        self.node = local_node(places.disk)
        ensure_tables(ledger)

    def run_once(self) -> UploadRound:
        """Upload every closed segment, and report the progress.

        Raises:
            DBAPIError: The ledger's database does not answer.
        """
        done = UploadRound()
        started_at = dt.datetime.now(dt.UTC)
        behind: dict[str, dt.datetime] = {}
        for location in self._logs():
            if not self._adopt(location, done):
                behind[location.name] = _BEGINNING
            elif (oldest := self._upload_log(location, done)) is not None:
                behind[location.name] = min(oldest, started_at)
        for log, name in abandoned_segments(self._engine, node=self.node, silent_s=self._silent_s):
            location = self._location(log)
            if not _path(location, name).exists():
                self._try(location, name, done)
        report(self._engine, self.node, until=started_at, logs=behind)
        return done

    def _location(self, name: str) -> LogLocation:
        return location_at(self._places, self._engine, name)

    def _logs(self) -> Iterator[LogLocation]:
        """Yield every log that this machine has a folder of."""
        for kind in KINDS:
            for folder in sorted(Path(self._places.disk, kind).glob("*/")):
                yield self._location(f"{kind}/{folder.name}")

    def _upload_log(self, location: LogLocation, done: UploadRound) -> dt.datetime | None:
        """Upload the closed segments of a log.

        Returns:
            Time from which on records of the log are on this machine only; None if there are none.
        """
        assert location.engine is not None, "A log with a remote root has a database."
        in_database = segment_sizes(location.engine, location.name)
        behind = []
        for path in list_segments(location.folder):
            with _closed(path) as is_closed:
                if is_closed and self._try(location, path.stem, done):
                    continue
            # Chunks are added before the answer, so what the database lacks of such a segment has no answer yet.
            if path.stem not in in_database and _has_records(path):
                behind.append(_started_at(path))
        remove_unfinished(location.folder)
        return min(behind, default=None)

    def _adopt(self, location: LogLocation, done: UploadRound) -> bool:
        """Move a table that an older release kept on the disk; return False if that failed."""
        try:
            adopt_local_table(location)
        except Exception as error:  # noqa: BLE001 (as in `_try`)
            LOG.warning("the local table of %s was not moved: %s", location.name, error)
            done.failures.append(f"{location.name}: {error}")
            return False
        return True

    def _try(self, location: LogLocation, name: str, done: UploadRound) -> bool:
        """Upload one segment; return False if it failed, with a message in `done`."""
        try:
            upload_segment(location, name)
        except Exception as error:  # noqa: BLE001 (an object store has errors of its own; the others go on)
            LOG.warning("segment %s of %s was not uploaded: %s", name, location.name, error)
            done.failures.append(f"{location.name}/{name}: {error}")
            return False
        done.uploaded += 1
        return True


def upload_segment(location: LogLocation, name: str) -> None:
    """Upload a closed segment, then remove its chunks and its local file. A second call changes nothing.

    Raises:
        RecordLogCorrupt: The storage root has another file of this name, or disk and database have different lines.
        OSError: The storage root does not answer.
    """
    uri = shared_uri(location, name)
    assert uri is not None, "Only a shared log has uploads."
    assert location.engine is not None, "A shared log has a database."
    path = _path(location, name)
    on_disk = _whole_lines(path.read_bytes()) if path.exists() else b""
    content = _merged(on_disk, seal(location.engine, location.name, name), uri)
    if content.count(b"\n") > 1:
        created = create_bytes(uri, content)
        stored = read_bytes(uri)
        if stored != content and (created or not _is_beginning(stored, content)):
            raise RecordLogCorrupt(
                f"{uri} exists with other content than this node's segment. Nothing was changed. Move the file away, "
                "and keep it."
            )
        if len(stored) < len(content):
            # Another node uploaded what the database had, when this one was silent. The rest has no answer.
            LOG.warning("%s has fewer lines than this node's file; the others have no answer", uri)
    remove_chunks(location.engine, location.name, name)
    path.unlink(missing_ok=True)


def _merged(on_disk: bytes, in_database: bytes, uri: str) -> bytes:
    """Return the longer of two copies of a segment: after a power cut, the file can have fewer lines."""
    shorter, longer = sorted((on_disk, in_database), key=len)
    if not _is_beginning(shorter, longer):
        raise RecordLogCorrupt(
            f"{uri}: the file on this node and the ledger's database have different lines. Nothing was changed. "
            "Restore the file from a backup, or move it away to upload what the database has."
        )
    return longer


def _is_beginning(content: bytes, whole: bytes) -> bool:
    return whole.startswith(content) and (not content or content.endswith(b"\n"))


def _whole_lines(content: bytes) -> bytes:
    """Return the content without an incomplete last line, whose answer was never sent."""
    return content[: content.rfind(b"\n") + 1]


@contextlib.contextmanager
def _closed(path: Path) -> Iterator[bool]:
    """Hold a segment's lock; yield False if its writer still has it open, or if it was removed."""
    with contextlib.ExitStack() as stack:
        is_closed = False
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            file = stack.enter_context(path.open("rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_closed = True
        yield is_closed


def _has_records(path: Path) -> bool:
    """Return whether a segment has more than its first line."""
    try:
        with path.open("rb") as file:
            return bool(file.readline()) and bool(file.read(1))
    except FileNotFoundError:
        return False


def _started_at(path: Path) -> dt.datetime:
    """Return when a segment was started, by its name."""
    try:
        return dt.datetime.strptime(path.stem.partition("-")[0], _NAME_TIME).replace(tzinfo=dt.UTC)
    except ValueError:
        return _BEGINNING


def _path(location: LogLocation, name: str) -> Path:
    return location.folder / f"{name}{SUFFIX}"
