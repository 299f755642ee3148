"""Sources of a view's rows: files, SQL and Kafka.

Columns of text files, JSON and SQL are read with the types that the view declares: its fields, its time and deletion
columns, and its join keys. Other columns are read as text, unless `columns` declares their dtypes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import sqlalchemy as sa

from cluster.errors import DefinitionError, did_you_mean
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.types.dtypes import DTYPES as DTYPES
from feature_jobs.store.types.instants import validate_zone


class FileFormat(enum.StrEnum):
    """Format of a source file."""

    parquet = "parquet"
    csv = "csv"
    """UTF-8, with a header."""
    json = "json"
    """One object per line."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of file names in this format."""
        return {
            FileFormat.parquet: (".parquet",),
            FileFormat.csv: (".csv", ".csv.gz"),
            FileFormat.json: (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz"),
        }[self]


@dataclass(frozen=True, slots=True)
class FileSource:
    """Files in Parquet, CSV or JSON lines: a path, a folder or a glob, on this machine or at any fsspec URI.

    A relative path starts at the project root. `{storage}` at the start of a path is replaced by the storage root.
    """

    path: str
    _: KW_ONLY
    event_timestamp: str
    """Column with the event time: when the values were true in the world."""
    created_timestamp: str | None = None
    """Column with the created time: when the source knew the values."""
    deleted: str | None = None
    """Bool column that is true for tombstones. After a tombstone the entity has no values, until a newer row."""
    format: str | None = None
    """`parquet`, `csv` or `json`. None means the format of the file's suffix, or Parquet if it is unknown."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Dtypes of columns that the view does not declare, or that it declares only as output of its transform."""
    delimiter: str = ","
    """Delimiter of CSV."""
    nulls: Sequence[str] = ("",)
    """Texts that mean null in CSV, unless they are in quotes."""
    zone: str | None = None
    """IANA name of the zone of times that have none, such as America/Los_Angeles. None means UTC. See `instants`."""

    def __post_init__(self) -> None:
        if not self.path:
            raise DefinitionError("A FileSource needs a path.")
        owner = f"FileSource('{self.path}')"
        _validate_columns(self, owner)
        if self.format is not None and self.format not in FileFormat.__members__:
            raise DefinitionError(
                f"{owner}: unknown format '{self.format}'.{did_you_mean(self.format, FileFormat.__members__)}"
            )
        if len(self.delimiter) != 1:
            raise DefinitionError(f"{owner}: delimiter must be one character, got {self.delimiter!r}.")
        if isinstance(self.nulls, str):
            raise DefinitionError(f"{owner}: nulls must be a list, got '{self.nulls}'.")
        object.__setattr__(self, "nulls", tuple(self.nulls))

    @property
    def kind(self) -> FileFormat:
        """The files' format."""
        if self.format is not None:
            return FileFormat(self.format)
        name = PurePosixPath(self.path).name.lower()
        matching = (file_format for file_format in FileFormat if name.endswith(file_format.suffixes))
        return next(matching, FileFormat.parquet)

    def definition(self) -> dict[str, Any]:
        """Return the source as the ledger records it.

        Unused fields are left out. A view's version is a hash of this JSON, so a new optional field does not change
        the version of a view that does not use it.
        """
        return {
            "path": self.path,
            "event_timestamp": self.event_timestamp,
            "created_timestamp": self.created_timestamp,
            **({} if self.deleted is None else {"deleted": self.deleted}),
            **({} if self.format is None else {"format": self.format}),
            **({} if not self.columns else {"columns": dict(self.columns)}),
            **({} if self.delimiter == "," else {"delimiter": self.delimiter}),
            **({} if self.nulls == ("",) else {"nulls": list(self.nulls)}),
            **({} if self.zone is None else {"zone": self.zone}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlSource:
    """A table or a query of a SQL database.

    The database URL is given in one of three ways, so that no password gets into a definition or the ledger.
    """

    url: str | None = None
    """SQLAlchemy URL without a password. A relative SQLite path starts at the project root."""
    url_env: str | None = None
    """Environment variable with the URL, on the machine where the command runs."""
    url_file: str | None = None
    """File with the URL."""
    query: str | None = None
    """SQL query. Give either `query` or `table`."""
    table: str | None = None
    """Table, optionally as `schema.table`."""
    event_timestamp: str
    """Column with the event time, as in `FileSource`."""
    created_timestamp: str | None = None
    """Column with the created time, as in `FileSource`."""
    deleted: str | None = None
    """Bool column of tombstones, as in `FileSource`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Dtypes of other columns, as in `FileSource`."""
    zone: str | None = None
    """Time zone of times that have none, as in `FileSource`."""

    def __post_init__(self) -> None:
        _validate_columns(self, "SqlSource")
        if [self.url, self.url_env, self.url_file].count(None) != 2:
            raise DefinitionError("A SqlSource needs one of url, url_env and url_file.")
        if (self.query is None) == (self.table is None):
            raise DefinitionError("A SqlSource needs a query or a table.")
        if self.url is not None and _has_password(self.url):
            raise DefinitionError(
                "A SqlSource's url must not hold a password, because definitions are recorded in the ledger. "
                "Give url_env or url_file."
            )

    @property
    def path(self) -> str:
        """The source as one word, as events record it."""
        address = self.url_env or self.url_file or "url"
        return f"sql:{address}:{self.table or 'query'}"

    def definition(self) -> dict[str, Any]:
        """Return the source as the ledger records it."""
        names = ("url", "url_env", "url_file", "query", "table", "deleted", "zone")
        optional = {name: getattr(self, name) for name in names}
        return {
            "kind": "sql",
            "event_timestamp": self.event_timestamp,
            "created_timestamp": self.created_timestamp,
            **{name: value for name, value in optional.items() if value is not None},
            **({} if not self.columns else {"columns": dict(self.columns)}),
        }


BatchSource = FileSource | SqlSource
Source = BatchSource | KafkaSource


def from_path(source: Source, path: str) -> FileSource:
    """Return a source that reads another file, with the columns of the view's own source.

    The suffix decides the file's format. If it is unknown, the file has the format of the view's own files.
    """
    if isinstance(source, FileSource):
        has_suffix = any(path.lower().endswith(file_format.suffixes) for file_format in FileFormat)
        return replace(source, path=path, format=None if has_suffix else source.kind.value)
    return FileSource(
        path,
        event_timestamp=source.event_timestamp,
        created_timestamp=source.created_timestamp,
        deleted=source.deleted,
        columns=source.columns,
        zone=source.zone,
    )


def _validate_columns(source: BatchSource, owner: str) -> None:
    """Validate the columns of times and deletions, the zone and the declared dtypes.

    A created timestamp that names the event timestamp's column is set to None.

    Raises:
        DefinitionError: A column, the zone or a dtype is invalid.
    """
    if not source.event_timestamp:
        raise DefinitionError(f"{owner} needs event_timestamp, the name of a column.")
    validate_zone(source.zone, owner)
    if source.deleted in ("", source.event_timestamp, source.created_timestamp or source.event_timestamp):
        raise DefinitionError(f"{owner}: deleted must name a bool column of its own.")
    if source.created_timestamp == source.event_timestamp:
        object.__setattr__(source, "created_timestamp", None)
    for name, dtype in source.columns.items():
        if dtype not in DTYPES:
            raise DefinitionError(
                f"{owner}: column '{name}' has the unknown dtype '{dtype}'.{did_you_mean(dtype, DTYPES)}"
            )


def _has_password(url: str) -> bool:
    try:
        parsed = sa.engine.make_url(url)
    except sa.exc.ArgumentError as error:
        raise DefinitionError("A SqlSource's url is not a valid SQLAlchemy URL.") from error
    return parsed.password is not None or any("pass" in key.lower() for key in parsed.query)
