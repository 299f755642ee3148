"""Find the rows to score, and cut them into parts.

A part is what one task reads and writes. The parts depend only on the content of the files and on `part_rows`, so a
resumed run has the same parts. A part of Parquet is at most `part_rows` rows of one file. A CSV file is one part,
because no row of it can be found without reading the rows before.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from cluster.errors import ConfigError, SourceError, TrainingSetError, did_you_mean
from cluster.ledger import Ledger
from cluster.security.encryption.parquet import Protection
from cluster.storage import Layout, exists, file_system, resolve, sha256
from feature_jobs.store.catalog.protection import training_set_protection
from feature_jobs.store.catalog.specifications import ServiceSpec, service_spec
from feature_jobs.store.definitions.sources import FileFormat, FileSource
from feature_jobs.store.ingestion.files import find, header, row_group_sizes, tables
from feature_jobs.store.offline.manifest import read_manifest, require_recorded
from feature_jobs.store.offline.stored_training_set import training_set_aad
from feature_jobs.store.types.schema import EVENT
from feature_jobs.training_set import manifest_path
from jobs.score.config import InputFormat, ScoreConfig

_THREADS = 4
Sizes = dict[str, tuple[int, tuple[int, ...]]]
"""By path: number of rows of a file, and of each of its row groups."""
_DELTA_FEATURES = {"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"}
"""Features of Delta tables that do not change how a file's rows are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """One file of the input."""

    path: str
    rows: int
    first_row: int
    """Position of its first row in the whole input."""
    row_groups: tuple[int, ...] = ()
    """Number of rows of each row group of a Parquet file."""
    partition: tuple[tuple[str, Any], ...] = ()
    """Columns of a Delta table that are not in its files, with their value for this file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The rows to score, as plain data that can be sent to workers."""

    uri: str
    format: InputFormat
    files: tuple[InputFile, ...]
    schema: pa.Schema
    """Columns of the first file. The columns of CSV are text."""
    delimiter: str = ","
    hash: str = ""
    version: int | None = None
    """Version of a Delta table."""
    protection: Protection | None = None
    """Keys of a training set below the storage root; None for files that are not encrypted."""
    place: str | None = None
    """The path that such a training set is bound to."""
    service: ServiceSpec | None = None
    """Feature service of such a training set."""

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def text_source(self) -> FileSource:
        """How to read the files of CSV."""
        return FileSource(self.uri, event_timestamp=EVENT, format="csv", delimiter=self.delimiter)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows that one task scores."""

    number: int
    file: InputFile
    row_groups: tuple[int, ...] | None = None
    """Row groups to read; None for CSV."""
    skip: int = 0
    """Number of rows of the first row group that belong to earlier parts."""
    rows: int
    first_row: int
    """Position of the part's first row in the whole input."""


def open_source(config: ScoreConfig, *, places: Layout, ledger: Ledger) -> Source:
    """Find the input's files, count their rows and hash their content. All files are read once for this.

    Raises:
        SourceError: No file was found, a file cannot be read, the files differ in their columns, or have no rows.
        TrainingSetError: The input is below the storage root, and is not a recorded training set.
    """
    uri = resolve(config.input)
    kind = config.format or _format_of(uri)
    if is_below(uri, places.root):
        source = _stored_training_set(uri, kind, places=places, ledger=ledger)
    elif kind is InputFormat.delta:
        source = _delta(uri)
    else:
        source = _files(uri, kind, config.delimiter)
    if not source.rows:
        raise SourceError(f"{uri} has no rows.")
    if len(set(source.schema.names)) < len(source.schema.names):
        raise SourceError(f"{uri} has two columns of the same name. Rename one.")
    with ThreadPoolExecutor(_THREADS) as threads:
        hashes = list(threads.map(sha256, (file.path for file in source.files)))
    return replace(source, hash=hashlib.sha256("".join(hashes).encode()).hexdigest())


def is_below(uri: str, root: str) -> bool:
    """Return whether a path or URI is in a folder."""
    return f"{uri}/".startswith(f"{root.rstrip('/')}/")


def parts_of(source: Source, part_rows: int) -> list[Part]:
    """Cut the input into parts of at most `part_rows` rows. A CSV file is one part."""
    parts: list[Part] = []
    for file in source.files:
        whole = replace(file, row_groups=())  # a part is sent to a worker
        if source.format is InputFormat.csv:
            parts.append(Part(number=len(parts), file=whole, rows=file.rows, first_row=file.first_row))
            continue
        for groups, skip, rows, start in _ranges(file.row_groups, part_rows):
            first_row = file.first_row + start
            parts.append(
                Part(
                    number=len(parts),
                    file=whole,
                    row_groups=groups,
                    skip=skip,
                    rows=rows,
                    first_row=first_row,
                )
            )
    return parts


def _ranges(sizes: Sequence[int], part_rows: int) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """Yield row groups, rows to skip, number of rows and position in the file, for each part of a Parquet file.

    Small row groups are joined. A large one is cut into equal parts.
    """
    pending: list[int] = []
    start = pending_rows = 0
    for number, size in enumerate(sizes):
        if pending and pending_rows + size > part_rows:
            yield tuple(pending), 0, pending_rows, start
            start, pending, pending_rows = start + pending_rows, [], 0
        if size <= part_rows:
            pending.append(number)
            pending_rows += size
            continue
        count = -(-size // part_rows)
        bounds = [size * index // count for index in range(count + 1)]
        for low, high in itertools.pairwise(bounds):
            yield (number,), low, high - low, start + low
        start += size
    if pending_rows:
        yield tuple(pending), 0, pending_rows, start


def _format_of(uri: str) -> InputFormat:
    if exists(f"{uri}/_delta_log"):
        return InputFormat.delta
    return InputFormat.csv if uri.lower().endswith(FileFormat.csv.suffixes) else InputFormat.parquet


def _files(uri: str, kind: InputFormat, delimiter: str) -> Source:
    reading = FileSource(uri, event_timestamp=EVENT, format=kind.value, delimiter=delimiter)
    try:
        paths = find(uri, reading.kind)
    except SourceError as error:
        raise SourceError(
            f"No {kind.value} file at {uri}. Give a file, a folder, a pattern or a Delta table with `input=…`, and "
            "`format=…` if the name does not say the format."
        ) from error
    if kind is InputFormat.csv:
        schema = pa.schema([(name, pa.string()) for name in header(paths[0], reading)])
        sizes: Sizes = {path: (sum(map(len, tables(path, 1, reading))), ()) for path in paths}
        for path in paths[1:]:
            _require_columns(schema.names, header(path, reading), path)
    else:
        schema, sizes = _parquet(paths, reading)
    return Source(uri=uri, format=kind, files=_numbered(sizes), schema=schema, delimiter=delimiter)


def _parquet(paths: Sequence[str], reading: FileSource) -> tuple[pa.Schema, Sizes]:
    sizes: Sizes = {}
    for path in paths:
        groups = tuple(row_group_sizes(path, reading))
        sizes[path] = (sum(groups), groups)
    schema = read_schema(paths[0])
    for path in paths[1:]:
        _require_columns(schema.names, read_schema(path).names, path)
    return schema, sizes


def _numbered(
    sizes: Sizes,
    partitions: Mapping[str, tuple[tuple[str, Any], ...]] | None = None,
) -> tuple[InputFile, ...]:
    files, first_row = [], 0
    for path, (rows, groups) in sizes.items():
        files.append(
            InputFile(
                path=path,
                rows=rows,
                first_row=first_row,
                row_groups=groups,
                partition=(partitions or {}).get(path, ()),
            )
        )
        first_row += rows
    return tuple(files)


def _require_columns(expected: Sequence[str], actual: Sequence[str], path: str) -> None:
    missing = [name for name in expected if name not in actual]
    if missing:
        raise SourceError(f"File {path} has no column '{missing[0]}', which the first file has.")


def read_schema(path: str) -> pa.Schema:
    """Return the columns of a Parquet file.

    Raises:
        SourceError: The file is not Parquet.
    """
    fs, name = file_system(path)
    try:
        with fs.open(name, "rb") as file:
            return pq.ParquetFile(file).schema_arrow.remove_metadata()
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {str(error)[:200]}") from error


def _delta(uri: str) -> Source:
    try:
        table = DeltaTable(uri)
        features = set(table.protocol().reader_features or ())
        actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
        schema = pa.schema(table.schema().to_arrow())
    except DeltaError as error:
        raise SourceError(f"{uri} cannot be read as a Delta table: {str(error)[:200]}") from error
    if unknown := sorted(features - _DELTA_FEATURES):
        raise SourceError(
            f"The Delta table {uri} uses {', '.join(unknown)}, so its files alone do not have its rows. Write it "
            "without this feature."
        )
    partitions, paths = {}, []
    for action in sorted(actions, key=lambda action: str(action["path"])):
        name = unquote(action["path"])  # Delta's log has the paths URL-encoded
        path = name if "://" in name else f"{uri}/{name}"
        prefix = "partition."
        partitions[path] = tuple(
            (name.removeprefix(prefix), value) for name, value in action.items() if name.startswith(prefix)
        )
        paths.append(path)
    if not paths:
        raise SourceError(f"{uri} has no rows.")
    reading = FileSource(uri, event_timestamp=EVENT, format="parquet")
    sizes = {
        path: (sum(groups), groups) for path in paths for groups in [tuple(row_group_sizes(path, reading))]
    }
    return Source(
        uri=uri,
        format=InputFormat.delta,
        files=_numbered(sizes, partitions),
        schema=schema,
        version=int(table.version()),
    )


def _stored_training_set(uri: str, kind: InputFormat, *, places: Layout, ledger: Ledger) -> Source:
    """Open a training set below the storage root. Its pages are authenticated together with the file's path.

    Raises:
        TrainingSetError: It is not a training set that this installation built.
    """
    manifest_uri = manifest_path(uri)
    if kind is not InputFormat.parquet or not uri.endswith(".parquet") or not exists(manifest_uri):
        raise TrainingSetError(
            f"{uri} is below the storage root and is not a training set with a manifest, so its rows cannot be scored. "
            "Move your own files out of the storage root. Features of a view are read with inputs_from=latest."
        )
    manifest = read_manifest(manifest_uri)
    require_recorded(manifest, ledger)
    spec = service_spec(ledger, manifest.service, manifest.service_version)
    reading = FileSource(uri, event_timestamp=EVENT, format="parquet")
    schema, sizes = _parquet([uri], reading)
    return Source(
        uri=uri,
        format=InputFormat.parquet,
        files=_numbered(sizes),
        schema=schema,
        protection=training_set_protection(spec),
        place=training_set_aad(uri, places),
        service=spec,
    )


def require_known_columns(source: Source, names: Sequence[str], *, option: str) -> None:
    """Require that the input has some columns.

    Raises:
        ConfigError: It lacks one.
    """
    for name in names:
        if name not in source.schema.names:
            raise ConfigError(
                f"{option}: the input has no column '{name}'.{did_you_mean(name, source.schema.names)}"
            )
