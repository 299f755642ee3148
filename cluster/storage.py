"""Paths of all state, and functions to read and write files there.

Every path is an fsspec URI or a local path. Writes are atomic. On a disk, a file gets a temporary name in the same
folder, is flushed, and is then renamed. In an object store, one request writes the whole file or nothing.

Functions for Parquet import Arrow when they are called, because most processes of a cluster never call them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import fsspec
from fsspec.core import url_to_fs

from cluster.errors import ConfigError
from cluster.host.this_node import this_node
from cluster.settings import Durability, PlatformConfig, StorageConfig

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROOT_VARIABLE = "FALAJ_PROJECT_ROOT"
RECORD_NAME = "cluster.json"
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "az")
"""Schemes of stores in which one request writes a whole file."""


def project_root() -> Path:
    """Return the folder that relative paths are resolved against.

    `cluster.up` sets it in `FALAJ_PROJECT_ROOT` for all processes of the cluster. Without this variable, it is the
    current folder or its nearest parent that has a cluster's record. Without a record, it is the current folder.
    """
    if root := os.environ.get(ROOT_VARIABLE):
        return Path(root)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".falaj" / RECORD_NAME).exists():
            return folder
    return here


def is_uri(path: str) -> bool:
    """Return whether a path is a URI of a file system that is not this machine's."""
    return "://" in path and not path.startswith("file://")


def resolve(path: str) -> str:
    """Return the absolute path or URI. Relative paths start at the project root."""
    if is_uri(path):
        return path.rstrip("/")
    return str(project_root() / Path(path.removeprefix("file://")).expanduser())


def local(path: str) -> Path:
    """Return a local `Path`.

    Raises:
        ConfigError: The path is a remote URI.
    """
    if is_uri(path):
        raise ConfigError(f"'{path}' is remote, but this state must be on a local disk. Set storage.local.")
    return Path(path)


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of all state: shared folders below `root`, and this machine's folders below `disk`."""

    root: str
    """`storage.root`."""
    local: str = ""
    """`storage.local`; empty means `root`."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Another node has another folder for its own state.
        return _layout_here, (self.root, self.local)

    @property
    def disk(self) -> str:
        """Folder of the state that never leaves this machine."""
        return self.local or self.root

    @property
    def ledger_path(self) -> str:
        return f"{self.disk}/ledger.db"

    @property
    def online(self) -> str:
        return f"{self.disk}/online"

    @property
    def keys(self) -> str:
        return f"{self.disk}/keys"

    @property
    def tls(self) -> str:
        return f"{self.disk}/tls"

    @property
    def edge(self) -> str:
        return f"{self.disk}/edge"

    @property
    def demo(self) -> str:
        return f"{self.disk}/demo"

    @property
    def pipelines(self) -> str:
        return f"{self.disk}/pipelines"

    @property
    def runs(self) -> str:
        return f"{self.disk}/runs"

    def features(self, view: str) -> str:
        return f"{self.root}/features/{view}"

    def push(self, view: str) -> str:
        return f"{self.disk}/push/{view}"

    def quarantine(self, view: str) -> str:
        return f"{self.root}/quarantine/{view}"

    def models(self, name: str) -> str:
        return f"{self.root}/models/{name}"

    def model(self, name: str, version: int) -> str:
        return f"{self.root}/models/{name}/{version}"

    @property
    def shared(self) -> str | None:
        """`root` if it is remote, so that all machines see it; else None."""
        return self.root if is_uri(self.root) else None

    def predictions(self, model: str) -> str:
        """Folder of this machine's segments; `cluster/records/location.py` says where the rest of the log is."""
        return f"{self.disk}/predictions/{model}"

    def outcomes(self, model: str) -> str:
        """Folder of this machine's segments, as `predictions`."""
        return f"{self.disk}/outcomes/{model}"

    def serving(self, app: str) -> str:
        return f"{self.root}/serving/{app}.json"

    def skew(self, model: str) -> str:
        return f"{self.root}/skew/{model}"

    def monitor(self, model: str) -> str:
        return f"{self.root}/monitor/{model}"


def layout(storage: StorageConfig) -> Layout:
    """Return the layout of a configured storage."""
    root = resolve(storage.root)
    if storage.local is not None:
        return _layout_here(root, str(local(resolve(storage.local))))
    return _layout_here(root, f"{project_root()}/.falaj" if is_uri(root) else "")


def _layout_here(root: str, local_root: str) -> Layout:
    """Return the layout with this node's own folder, if the process runs on a node of the cluster with this root."""
    node = this_node(storage_root=root)
    return Layout(root, local_root if node is None or node.local_root == root else node.local_root)


def check_durability(config: PlatformConfig) -> None:
    """Check that records can leave the machine before their request is answered, if they must.

    Raises:
        ConfigError: `replica.durability=shared` without a remote storage root and PostgreSQL.
    """
    if config.replica.durability is not Durability.shared:
        return
    if not is_uri(config.storage.root) or not (config.ledger.url or "").startswith("postgresql"):
        raise ConfigError(
            "replica.durability=shared needs ledger.url=postgresql+psycopg://… and a remote storage.root (storage=s3): "
            "a record on this machine's disk alone is lost with it. Set both, or use replica.durability=disk."
        )


def file_name(text: str) -> str:
    """Encode a text as one path component; different texts get different names.

    Letters, digits, `_`, `-`, `~` and dots stay, except a dot at the start. All other characters are percent-encoded.
    """
    quoted = quote(text, safe="")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def file_system(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URI, and the path in it.

    Listings are not cached, because other processes may write files at any time.
    """
    fs, path = url_to_fs(uri, use_listings_cache=False) if is_uri(uri) else url_to_fs(uri)
    return fs, str(path)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically."""
    fs, path = file_system(uri)
    if urlsplit(uri).scheme in OBJECT_STORES:
        fs.pipe_file(path, bytes(data))
        return
    fs.makedirs(fs._parent(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with fs.open(temporary, "wb") as file:
            file.write(data)
            if not is_uri(uri):
                file.flush()
                os.fsync(file.fileno())
        _replace(fs, temporary, path)
    except BaseException:
        if fs.exists(temporary):
            fs.rm(temporary)
        raise


def create_bytes(uri: str, data: bytes) -> bool:
    """Create a remote file in one request; return False if it exists already."""
    fs, path = file_system(uri)
    return created(fs, path, data)


def remove(uri: str) -> None:
    """Remove a file if it exists."""
    if not is_uri(uri):
        Path(uri).unlink(missing_ok=True)
        return
    fs, path = file_system(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def created(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> bool:
    """Create a file in one request; return False if it exists already."""
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def write_json(uri: str, content: Any) -> None:
    """Write a JSON file atomically. NaN and infinities become null, because JSON cannot represent them."""
    write_bytes(uri, json_text(content).encode())


def json_text(content: Any) -> str:
    """Return plain data as indented JSON. NaN and infinities become null."""
    return json.dumps(replace_non_finite(content), indent=1, allow_nan=False)


def replace_non_finite(content: Any) -> Any:
    """Return plain data with each NaN and infinity replaced by None."""
    match content:
        case float():
            return content if math.isfinite(content) else None
        case dict():
            return {key: replace_non_finite(value) for key, value in content.items()}
        case list() | tuple():
            return [replace_non_finite(value) for value in content]
        case _:
            return content


def _replace(fs: fsspec.AbstractFileSystem, temporary: str, path: str) -> None:
    if fs.protocol in ("file", ("file", "local")):
        os.replace(temporary, path)
    else:
        fs.mv(temporary, path)


def read_bytes(uri: str) -> bytes:
    """Return a file's content."""
    fs, path = file_system(uri)
    return bytes(fs.cat_file(path))


def exists(uri: str) -> bool:
    """Return whether a file or folder exists."""
    fs, path = file_system(uri)
    return bool(fs.exists(path))


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Return the files directly in a folder, sorted; empty if the folder does not exist."""
    fs, path = file_system(uri)
    if not fs.exists(path):
        return []
    names = sorted(str(name) for name in fs.ls(path, detail=False) if str(name).endswith(suffix))
    return [fs.unstrip_protocol(name) if is_uri(uri) else name for name in names]


def sha256(uri: str) -> str:
    """Return the SHA-256 of a file's content in hex. The file is read in pieces."""
    fs, path = file_system(uri)
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_parquet(table: pa.Table, uri: str, *, row_group_rows: int | None = None) -> int:
    """Write a table as one Parquet file, atomically, and return the file's size in bytes.

    Args:
        table: Rows to write.
        uri: Path or URI of the file.
        row_group_rows: Largest number of rows of a row group; Arrow's default is 2^20.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=dictionary_columns(table.schema),
        row_group_size=row_group_rows,
    )
    data = sink.getvalue()
    write_bytes(uri, data)
    return int(data.size)


def dictionary_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that get a dictionary in Parquet.

    Columns of floats or timestamps get none. Their values rarely repeat, and most of the writing time would be spent on
    a dictionary that Parquet then discards.
    """
    import pyarrow as pa

    return [
        field.name
        for field in schema
        if not (pa.types.is_floating(field.type) or pa.types.is_timestamp(field.type))
    ]


def read_parquet(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, or only the columns named in `columns`.

    INT96 timestamps become nanoseconds if all values of the column fit into 64 bits, else microseconds.
    """
    import pyarrow.parquet as pq

    fs, path = file_system(uri)
    with fs.open(path, "rb") as file:
        # `pq.read_table` would import Arrow's dataset layer, and with it pandas.
        parquet = pq.ParquetFile(file)
        int96_names = [name for name in int96_columns(parquet) if columns is None or name in columns]
        table = parquet.read(columns)
        if not int96_names:
            return table
        microseconds = pq.ParquetFile(file, coerce_int96_timestamp_unit="us").read(int96_names)
    for name in int96_names:
        if not _fits_nanoseconds(microseconds[name]):
            table = table.set_column(table.schema.get_field_index(name), name, microseconds[name])
    return table


def int96_columns(file: pq.ParquetFile) -> list[str]:
    """Return the top-level columns with INT96 timestamps, as Spark, Impala and old Hive write them."""
    columns = (file.schema.column(index) for index in range(len(file.schema)))
    return [
        column.name for column in columns if column.physical_type == "INT96" and column.path == column.name
    ]


def _fits_nanoseconds(times: pa.ChunkedArray) -> bool:
    """Return whether all times, in microseconds, fit into 64 bits as nanoseconds: the years 1677 to 2262."""
    import pyarrow as pa
    import pyarrow.compute as pc

    limit = (2**63 - 1) // 1000 - 1
    numbers = times.cast(pa.int64())
    return bool(
        pc.all(pc.and_(pc.less_equal(numbers, limit), pc.greater_equal(numbers, -limit)), min_count=0).as_py()
    )
