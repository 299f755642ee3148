"""Files of a run: scores, rows that were set aside, the result of each part, and the manifest.

    part-00003-00000.parquet               scores: part 3, chunk 0
    _set_aside/part-00003-00000.parquet    rows of the same chunk that have no score
    _parts/00003.json                      written after the files of part 3: the part is done
    _manifest.json                         written last: the run is done

A file is written completely or not at all, and its name depends only on its rows. So a part that is done twice changes
nothing. Names that begin with `_` are ignored by Spark, Arrow and Polars when they read the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from cluster.known_fields import known_fields
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess
from cluster.storage import file_system, json_text, list_files, read_bytes, remove, write_bytes, write_parquet

MANIFEST = "_manifest.json"
RUN = "_run.json"
_PARTS, _SET_ASIDE = "_parts", "_set_aside"
_LEFT_BEHIND = re.compile(r"part-\d+-\d+\.parquet\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """The output folder of a run, as plain data that can be sent to workers."""

    uri: str
    key: str | None
    """Key of all columns; None for a folder outside the storage root, whose files are not encrypted."""
    place: str
    """Path of the folder below the storage root; the files' AAD begins with it."""
    access: KeyAccess

    def write(self, table: pa.Table, name: str) -> None:
        """Write a file, encrypted if the folder is below the storage root."""
        if self.key is None:
            write_parquet(table, f"{self.uri}/{name}")
        else:
            protected_files(self.access).write(
                table, f"{self.uri}/{name}", Protection(default=self.key), place=f"{self.place}/{name}"
            )

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read a file, or some of its columns.

        Raises:
            ProtectedFileCorrupt: The file was altered, or belongs to another place.
            AccessDenied, KeyRevoked: The key store refuses the key.
        """
        return protected_files(self.access).read(
            f"{self.uri}/{name}",
            columns,
            protection=None if self.key is None else Protection(default=self.key),
            place=None if self.key is None else f"{self.place}/{name}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FileOfRows:
    """A file of the run."""

    name: str
    """Relative to the folder."""
    rows: int
    sha256: str = ""
    """Set in the manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartResult:
    """What a part has written."""

    number: int
    rows: int
    files: tuple[FileOfRows, ...] = ()
    """Files with scores."""
    set_aside_files: tuple[FileOfRows, ...] = ()
    set_aside: dict[str, int] = field(default_factory=dict)
    """Number of rows without a score, by reason."""
    columns: tuple[str, ...] = ()
    """Columns of the files with scores."""

    @property
    def scored(self) -> int:
        """Number of rows with a score."""
        return sum(file.rows for file in self.files)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a finished run has written."""

    run: str
    model: str
    version: int
    key: str | None
    """Key of the files; None if they are not encrypted."""
    input: str
    input_hash: str
    rows: int
    scored: int
    set_aside: dict[str, int]
    columns: list[str]
    files: list[FileOfRows]
    set_aside_files: list[FileOfRows]

    def to_bytes(self) -> bytes:
        """Return the manifest as JSON. The same manifest gives the same bytes."""
        return json_text(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse a manifest.

        Raises:
            KeyError, TypeError, ValueError: It is not a manifest.
        """
        content = json.loads(data)
        for name in ("files", "set_aside_files"):
            content[name] = [FileOfRows(**known_fields(FileOfRows, file)) for file in content[name]]
        return cls(**known_fields(cls, content))


def scores_name(part: int, chunk: int) -> str:
    """Return the name of a file with scores."""
    return f"part-{part:05}-{chunk:05}.parquet"


def set_aside_name(part: int, chunk: int) -> str:
    """Return the name of a file with rows that have no score."""
    return f"{_SET_ASIDE}/{scores_name(part, chunk)}"


def write_result(folder: Folder, result: PartResult) -> None:
    """Record that a part is done."""
    write_bytes(f"{folder.uri}/{_PARTS}/{result.number:05}.json", json.dumps(asdict(result)).encode())


def read_results(folder: Folder) -> dict[int, PartResult]:
    """Return the parts that are done, by number."""
    results = {}
    for path in list_files(f"{folder.uri}/{_PARTS}", ".json"):
        content: dict[str, Any] = json.loads(read_bytes(path))
        for name in ("files", "set_aside_files"):
            content[name] = tuple(FileOfRows(**file) for file in content[name])
        content["columns"] = tuple(content["columns"])
        result = PartResult(**content)
        results[result.number] = result
    return results


def write_run(uri: str, run: str) -> None:
    """Say which run the files of a folder belong to."""
    write_bytes(f"{uri}/{RUN}", json_text({"run": run}).encode())


def read_run(uri: str) -> str | None:
    """Return the id of the run that a folder's files belong to; None if the folder does not say it."""
    try:
        run = json.loads(read_bytes(f"{uri}/{RUN}"))["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run if isinstance(run, str) else None


def remove_left_behind(folder: Folder) -> None:
    """Remove the incomplete files of killed processes."""
    for place in (folder.uri, f"{folder.uri}/{_SET_ASIDE}", f"{folder.uri}/{_PARTS}"):
        for path in list_files(place, ".tmp"):
            name = PurePosixPath(path).name
            if _LEFT_BEHIND.fullmatch(name) or place.endswith(_PARTS):
                remove(path)


def is_empty(uri: str) -> bool:
    """Return whether a folder has no files and folders, or does not exist."""
    fs, path = file_system(uri)
    return not fs.exists(path) or (fs.isdir(path) and not fs.ls(path, detail=False))


def digest(data: bytes) -> str:
    """Return the SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
