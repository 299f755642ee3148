"""`python -m cluster.records.upload`: upload this node's closed segments to the remote storage root, until SIGTERM.

`cluster.up` starts this process if the storage root is remote, and the supervisor restarts it. Every few seconds it
uploads what is closed, and reports until when the node's logs are complete. While the object store or the ledger's
database does not answer, segments stay on the disk.

A segment goes through these steps, each of which can be repeated after a kill:

1. it is sealed: its writer gets no more blocks into the ledger's database;
2. its file is created below the storage root with one request, which never overwrites another file;
3. the file is read again and compared;
4. its blocks are removed from the database;
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
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.entrypoint import job
from cluster.errors import ConfigError, Inconsistent, RecordLogCorrupt
from cluster.host.signals import set_on_signal
from cluster.ledger import Ledger, open_ledger
from cluster.metrics import new_registry, serve_metrics
from cluster.records.blocks import SILENT_S, abandoned_segments, remove_blocks, seal, segment_sizes
from cluster.records.compaction import adopt_local_table, remove_unfinished
from cluster.records.contents import shared_uri
from cluster.records.database import ensure_tables
from cluster.records.location import KINDS, LogLocation, local_node, location_at
from cluster.records.metrics import UploadMetrics
from cluster.records.progress import BEGINNING, forget, read_progress, report
from cluster.records.segments import SUFFIX, list_segments
from cluster.session import find_record
from cluster.settings import PlatformConfig
from cluster.storage import Layout, create_bytes, layout, read_bytes

EVERY_S = 5.0
LOG = logging.getLogger("falaj.uploader")
_NAME_TIME = "%Y%m%dT%H%M%S"


@dataclass(kw_only=True, slots=True)
class UploadRound:
    """What one look at all logs did."""

    uploaded: int = 0
    failures: list[str] = field(default_factory=list)
    """One message for each segment or log that could not be uploaded. The next round tries again."""
    behind: dict[str, dt.datetime] = field(default_factory=dict)
    """Logs with records on this machine only, and the time from which on."""


class Uploader:
    """Uploads the segments of one node.

    Args:
        places: The folders of the state. The storage root must be remote.
        ledger: Its database holds blocks and progress.
        silent_s: Seconds after which the segments of a silent node are uploaded by this one.
    """

    def __init__(self, places: Layout, ledger: Ledger, *, silent_s: float = SILENT_S) -> None:
        self._places, self._engine, self._silent_s = places, ledger.engine, silent_s
        self.node = local_node(places.disk)
        ensure_tables(ledger)

    def announce(self) -> None:
        """Report for the first time, before a replica of this node writes a record.

        Otherwise the logs would count as complete without this node, until its first round. An earlier report stays,
        because the disk may have records since then.

        Raises:
            DBAPIError: The ledger's database does not answer.
        """
        if any(progress.node == self.node for progress in read_progress(self._engine)):
            return
        now = dt.datetime.now(dt.UTC)
        behind = {log.name: BEGINNING for log in self._logs() if next(log.folder.iterdir(), None) is not None}
        report(self._engine, self.node, until=now, logs=behind)

    def run_once(self) -> UploadRound:
        """Upload every closed segment, and report the progress.

        Raises:
            DBAPIError: The ledger's database does not answer.
        """
        done = UploadRound()
        started_at = dt.datetime.now(dt.UTC)
        for location in self._logs():
            if not self._adopt(location, done):
                done.behind[location.name] = BEGINNING
            elif (oldest := self._upload_log(location, done)) is not None:
                done.behind[location.name] = min(oldest, started_at)
        for log, name in abandoned_segments(self._engine, node=self.node, silent_s=self._silent_s):
            location = self._location(log)
            if not _path(location, name).exists():
                self._try(location, name, done)
        report(self._engine, self.node, until=started_at, logs=done.behind)
        return done

    def leave(self) -> None:
        """Upload everything, after all writers of this node have ended; the node then counts no more.

        Raises:
            Inconsistent: A segment could not be uploaded, or is still open. The node still counts.
            DBAPIError: The ledger's database does not answer.
        """
        done = self.run_once()
        if done.failures or done.behind:
            reasons = "; ".join(done.failures) or "a replica still writes"
            raise Inconsistent(f"Not all records of node {self.node} are uploaded: {reasons}. Try again.")
        forget(self._engine, self.node)

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
            # Blocks are added before the answer, so what the database lacks of such a segment has no answer yet.
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
    """Upload a closed segment, then remove its blocks and its local file. A second call changes nothing.

    Raises:
        RecordLogCorrupt: The storage root has another file of this name, or disk and database have different lines.
        OSError: The storage root does not answer, or does not store what it is given.
    """
    uri = shared_uri(location, name)
    assert uri is not None, "Only a shared log has uploads."
    assert location.engine is not None, "A shared log has a database."
    path = _path(location, name)
    on_disk = _whole_lines(path.read_bytes()) if path.exists() else b""
    content = _merged(on_disk, seal(location.engine, location.name, name), uri)
    if content.count(b"\n") > 1:  # more than the first line
        created = create_bytes(uri, content)
        _require_stored(uri, content, read_bytes(uri), created=created)
    remove_blocks(location.engine, location.name, name)
    path.unlink(missing_ok=True)


def _require_stored(uri: str, content: bytes, stored: bytes, *, created: bool) -> None:
    """Require that an uploaded segment has every answered record.

    Raises:
        OSError: The store returns another content than it took.
        RecordLogCorrupt: Another file of this name existed.
    """
    if stored == content:
        return
    if created:
        raise OSError(f"{uri} was written with {len(content)} bytes and is read with other content.")
    if not _is_beginning(stored, content) and not _is_beginning(content, stored):
        raise RecordLogCorrupt(
            f"{uri} exists with other content than this node's segment. Nothing was changed. Move the file away, "
            "and keep it."
        )
    if len(stored) < len(content):
        # Another node uploaded what the database had, when this one was silent. The rest has no answer.
        LOG.warning("%s has fewer lines than this node's file; the others have no answer", uri)


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
        return BEGINNING


def _path(location: LogLocation, name: str) -> Path:
    return location.folder / f"{name}{SUFFIX}"


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Upload until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    places, stopped = layout(config.storage), threading.Event()
    if places.shared is None:
        raise ConfigError(
            f"storage.root {places.root} is on this machine, so no log is uploaded. Set storage=s3 and storage.root."
        )
    set_on_signal([signal.SIGTERM], stopped)
    uploader = Uploader(places, open_ledger(config))
    LOG.info("node %s uploads its logs to %s", uploader.node, places.shared)
    registry, record = new_registry(), find_record(config.storage)
    metrics = UploadMetrics(registry)
    serve_metrics(registry, port=None if record is None else record.ports.get("uploader_metrics"))
    while True:
        try:
            with metrics.seconds.time():
                done = uploader.run_once()
            metrics.count(uploaded=done.uploaded, failed=len(done.failures), behind=done.behind.values())
        except Exception as error:  # noqa: BLE001 (the database or the disk; the next round tries again)
            metrics.failed_rounds.inc()
            LOG.warning("the logs were not uploaded: %s", error)
        if stopped.wait(EVERY_S):
            return


if __name__ == "__main__":
    main()
