"""Count the records of a log by chunk and by hour, without a look at their inputs.

The counts of a file of the log's table never change, so they are kept. A later run reads only what is new. The counts
also identify the content of a chunk. A segment only grows. So the number of a chunk's records in each segment says
which records these are, before and after a compaction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
import polars as pl
import pyarrow as pa

from cluster.records.columns import LINE, OTHER, SEGMENT, to_record
from cluster.records.reading import fault_of, parse_time
from cluster.records.schema import SHADOW
from jobs.monitor.log.decode import NO_FAULT

COLUMNS = (
    SEGMENT, LINE, "time", "as_of", "version", "variant", "arm", "entities", "features", "predictions", "given",
    "defaulted", OTHER,
)  # fmt: skip
"""Columns of the log's table that the index needs."""


class Group(NamedTuple):
    """Key of the records that one version answered under one variant on one day."""

    variant: str
    version: int
    day: str
    """Day of `as_of` in UTC, such as 2026-11-30."""


@dataclass(kw_only=True, slots=True)
class GroupCount:
    """Numbers of records and rows of a group in one segment."""

    records: int = 0
    answered: int = 0
    """Rows with an answer."""
    failed: int = 0
    """Rows without a finite score."""


@dataclass(kw_only=True, slots=True)
class HourCount:
    """Traffic of one hour."""

    requests: int = 0
    refused: int = 0
    """Requests with a record and without an answer, and those that got 4xx (`with_refusals`)."""
    entities: int = 0
    unseen: int = 0
    """Entities for which no feature was found: all that was read is null or a default."""


@dataclass(kw_only=True, slots=True)
class SegmentCount:
    """What an index has of one segment, or of a part of it that is in one file."""

    lines: int = 0
    """Largest line number and one."""
    groups: dict[Group, GroupCount] = field(default_factory=dict)
    hours: dict[str, HourCount] = field(default_factory=dict)
    """By hour of the answer in UTC, such as 2026-11-30T09."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "lines": self.lines,
            "groups": [[*key, one.records, one.answered, one.failed] for key, one in self.groups.items()],
            "hours": [
                [hour, one.requests, one.refused, one.entities, one.unseen]
                for hour, one in self.hours.items()
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SegmentCount:
        """Return what `to_json` converted.

        Raises:
            KeyError, TypeError, ValueError: The data is something else.
        """
        return cls(
            lines=data["lines"],
            groups={
                Group(variant, version, day): GroupCount(records=records, answered=answered, failed=failed)
                for variant, version, day, records, answered, failed in data["groups"]
            },
            hours={
                hour: HourCount(requests=requests, refused=refused, entities=entities, unseen=unseen)
                for hour, requests, refused, entities, unseen in data["hours"]
            },
        )


def count_records(table: pa.Table) -> dict[str, SegmentCount]:
    """Count the records of a table by segment. Records of shadows are not counted, because no client got them.

    Args:
        table: Records with the columns `COLUMNS`.
    """
    rows = pl.DataFrame(pl.from_arrow(table))
    counts = {
        str(segment): SegmentCount(lines=lines + 1)
        for segment, lines in rows.group_by(SEGMENT, maintain_order=True).agg(pl.col(LINE).max()).iter_rows()
    }
    rows = normalise(rows).filter(pl.col("arm").ne_missing(SHADOW))
    rows = _with_numbers(rows).with_columns(
        day_of("as_of").alias("_day"),
        pl.col("time").dt.strftime("%Y-%m-%dT%H").alias("_hour"),
    )
    by_group = rows.group_by(SEGMENT, "variant", "version", "_day", maintain_order=True).agg(
        pl.len(), pl.col("_answered").sum(), pl.col("_failed").sum()
    )
    for segment, variant, version, day, records, answered, failed in by_group.iter_rows():
        group = Group(str(variant), int(version or 0), day)
        counts[segment].groups[group] = GroupCount(records=records, answered=answered, failed=failed)
    by_hour = (
        rows.drop_nulls("_hour")
        .group_by(SEGMENT, "_hour", maintain_order=True)
        .agg(
            pl.len(),
            (pl.col("_failed") > 0).sum(),
            (pl.col("_answered") + pl.col("_failed")).sum().alias("_entities"),
            pl.col("_unseen").sum(),
        )
    )
    for segment, hour, requests, refused, entities, unseen in by_hour.iter_rows():
        counts[segment].hours[hour] = HourCount(
            requests=requests, refused=refused, entities=entities, unseen=unseen
        )
    return counts


def normalise(rows: pl.DataFrame) -> pl.DataFrame:
    """Fill columns from `other`, where a record of an older release has values that do not fit their column.

    A variant becomes text, and a time that cannot be parsed becomes null, as in `cluster.records.reading`.
    """
    odd = rows.with_row_index("_number").filter(~pl.col(OTHER).str.starts_with(NO_FAULT))
    columns: dict[str, list[Any]] = {}
    for number, text in odd.select("_number", OTHER).iter_rows():
        for name, value in orjson.loads(text).items():
            if name in _CONVERSIONS and name in rows.columns:
                columns.setdefault(name, rows[name].to_list())[number] = _CONVERSIONS[name](value)
    return rows.with_columns(
        pl.Series(name, values, dtype=rows[name].dtype, strict=False) for name, values in columns.items()
    )


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "variant": str,
    "arm": str,
    "version": lambda value: value,
    "as_of": parse_time,
    "time": parse_time,
}


def day_of(column: str) -> pl.Expr:
    """Return the day of a time, as in `Group`."""
    return pl.col(column).dt.strftime("%Y-%m-%d").fill_null("None")


def _with_numbers(rows: pl.DataFrame) -> pl.DataFrame:
    """Add the numbers of answered and failed rows, and of unseen entities, of each record.

    Usual records of one row are recognised by their text. Only the others are parsed.
    """
    one_row = pl.col("predictions").str.count_matches("{", literal=True) == 1
    one_entity = pl.col("entities").str.count_matches("{", literal=True) == 1
    usual = (
        one_row
        & one_entity
        & ~pl.col("predictions").str.contains("null", literal=True)
        & (pl.col(OTHER).is_null() | pl.col(OTHER).str.starts_with(NO_FAULT))
    )
    has_nulls = pl.col("features").str.contains("null", literal=True)
    all_found = ~has_nulls & (pl.col("defaulted").is_null() | (pl.col("defaulted") == "{}"))
    rows = rows.with_columns(
        usual.fill_null(False).alias("_usual"), all_found.fill_null(False).alias("_all_found")
    )
    answered = rows["_usual"].cast(pl.Int64).to_list()
    failed, unseen = [0] * rows.height, [0] * rows.height
    to_parse = rows.with_row_index("_number").filter(~(pl.col("_usual") & pl.col("_all_found")))
    for row in to_parse.iter_rows(named=True):
        number, record = row["_number"], to_record("predictions", row)
        size = max(len(record["predictions"]), len(record["entities"]))
        failed[number] = sum(bool(fault_of(record, position)) for position in range(size))
        answered[number] = size - failed[number]
        unseen[number] = unseen_entities(record, size)
    return rows.with_columns(
        pl.Series("_answered", answered, dtype=pl.Int64),
        pl.Series("_failed", failed, dtype=pl.Int64),
        pl.Series("_unseen", unseen, dtype=pl.Int64),
    )


def unseen_entities(record: dict[str, Any], size: int) -> int:
    """Return for how many entities of a request no feature was found. If the client sent all inputs, it is 0.

    Args:
        record: A prediction record.
        size: Number of its entities.
    """
    given = set(record.get("given") or ())
    read = {name: values for name, values in record["features"].items() if name not in given}
    defaulted = record.get("defaulted") or {}
    return sum(
        all(
            position < len(values) and (values[position] is None or position in defaulted.get(name, ()))
            for name, values in read.items()
        )
        for position in range(size)
        if read
    )
