"""Where a view's rows come from.

Columns of text files, and values of JSON and SQL, are read as the view declares them: its fields, the columns of times
and of deletions, and its join keys. Any other column, which a transform may want, comes as text, unless `columns` gives
its dtype.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import sqlalchemy as sa

from cluster.errors import DefinitionError, did_you_mean
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.types.dtypes import DTYPES as DTYPES
from feature_jobs.store.types.instants import check_zone


class FileFormat(enum.StrEnum):
    """How rows are written in a file."""

    parquet = "parquet"
    csv = "csv"
    """With a header, UTF-8."""
    json = "json"
    """One object a line."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of file names."""
        return {
            FileFormat.parquet: (".parquet",),
            FileFormat.csv: (".csv", ".csv.gz"),
            FileFormat.json: (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz"),
        }[self]


@dataclass(frozen=True, slots=True)
class FileSource:
    """Files of Parquet, CSV or JSON lines: a path, a folder or a glob, on this machine or by any fsspec URI.

    A relative path counts from the project root; `{storage}` at its start stands for the storage root.
    """

    path: str
    _: KW_ONLY
    event_timestamp: str
    """Column that says when a row was true in the world."""
    created_timestamp: str | None = None
    """Column that says when the source knew it."""
    deleted: str | None = None
    """Bool column; a row with it true is a tombstone: from then on the entity has no values, until a newer row."""
    format: str | None = None
    """`parquet`, `csv` or `json`; none goes by the name, and takes Parquet where that does not say."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Dtypes of columns that the view does not declare, or declares for its transform's output."""
    delimiter: str = ","
    """Of CSV."""
    nulls: Sequence[str] = ("",)
    """What stands for null in CSV; in quotes it is text."""
    zone: str | None = None
    """IANA name of the time zone of times without one, as America/Los_Angeles; None is UTC. See `instants`."""

    def __post_init__(self) -> None:
        if not self.path:
            raise DefinitionError("A FileSource needs a path.")
        what = f"FileSource('{self.path}')"
        _check_times(self, what)
        if self.format is not None and self.format not in FileFormat.__members__:
            raise DefinitionError(
                f"{what}: unknown format '{self.format}'.{did_you_mean(self.format, FileFormat.__members__)}"
            )
        if len(self.delimiter) != 1:
            raise DefinitionError(f"{what}: delimiter must be one character, got {self.delimiter!r}.")
        if isinstance(self.nulls, str):
            raise DefinitionError(f"{what}: nulls must be a list, got '{self.nulls}'.")
        object.__setattr__(self, "nulls", tuple(self.nulls))

    @property
    def kind(self) -> FileFormat:
        """The format."""
        if self.format is not None:
            return FileFormat(self.format)
        name = PurePosixPath(self.path).name.lower()
        return next((one for one in FileFormat if name.endswith(one.suffixes)), FileFormat.parquet)

    def definition(self) -> dict[str, Any]:
        """As it stands in the ledger: with what is used, so that views of before keep their version."""
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

    The address is given in one of three ways, so that no password comes into a definition or the ledger.
    """

    url: str | None = None
    """SQLAlchemy URL without a password; a relative SQLite file counts from the project root."""
    url_env: str | None = None
    """Environment variable that holds the URL, where the command runs."""
    url_file: str | None = None
    """File that holds the URL."""
    query: str | None = None
    table: str | None = None
    """In place of a query; `schema.table` works."""
    event_timestamp: str
    created_timestamp: str | None = None
    deleted: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    zone: str | None = None
    """As of a FileSource."""

    def __post_init__(self) -> None:
        _check_times(self, "SqlSource")
        if [self.url, self.url_env, self.url_file].count(None) != 2:
            raise DefinitionError("A SqlSource needs one of url, url_env and url_file.")
        if (self.query is None) == (self.table is None):
            raise DefinitionError("A SqlSource needs a query or a table.")
        if self.url is not None and _has_password(self.url):
            raise DefinitionError(
                "A SqlSource's url must not hold a password, because definitions stand in the ledger. "
                "Give url_env or url_file."
            )

    @property
    def path(self) -> str:
        """What events call it."""
        where = self.url_env or self.url_file or "url"
        return f"sql:{where}:{self.table or 'query'}"

    def definition(self) -> dict[str, Any]:
        """As it stands in the ledger."""
        names = ("url", "url_env", "url_file", "query", "table", "deleted", "zone")
        given = {name: getattr(self, name) for name in names}
        return {
            "kind": "sql",
            "event_timestamp": self.event_timestamp,
            "created_timestamp": self.created_timestamp,
            **{name: value for name, value in given.items() if value is not None},
            **({} if not self.columns else {"columns": dict(self.columns)}),
        }


BatchSource = FileSource | SqlSource
Source = BatchSource | KafkaSource


def from_path(source: Source, path: str) -> FileSource:
    """Another file in place of a view's own source, with the same columns."""
    if isinstance(source, FileSource):
        named = any(path.lower().endswith(one.suffixes) for one in FileFormat)
        return FileSource(
            path,
            event_timestamp=source.event_timestamp,
            created_timestamp=source.created_timestamp,
            deleted=source.deleted,
            format=None if named else source.kind.value,
            columns=source.columns,
            delimiter=source.delimiter,
            nulls=source.nulls,
            zone=source.zone,
        )
    return FileSource(
        path,
        event_timestamp=source.event_timestamp,
        created_timestamp=source.created_timestamp,
        deleted=source.deleted,
        columns=source.columns,
        zone=source.zone,
    )


def _check_times(source: Source, what: str) -> None:
    if not source.event_timestamp:
        raise DefinitionError(f"{what} needs event_timestamp, the name of a column.")
    check_zone(source.zone, what)
    if source.deleted in ("", source.event_timestamp, source.created_timestamp or source.event_timestamp):
        raise DefinitionError(f"{what}: deleted must name a bool column of its own.")
    if source.created_timestamp == source.event_timestamp:
        object.__setattr__(source, "created_timestamp", None)
    for name, dtype in source.columns.items():
        if dtype not in DTYPES:
            raise DefinitionError(
                f"{what}: column '{name}' has the unknown dtype '{dtype}'.{did_you_mean(dtype, DTYPES)}"
            )


def _has_password(url: str) -> bool:
    try:
        parsed = sa.engine.make_url(url)
    except sa.exc.ArgumentError as error:
        raise DefinitionError("A SqlSource's url is no SQLAlchemy URL.") from error
    return parsed.password is not None or any("pass" in key.lower() for key in parsed.query)
