"""Logged predictions as requests to the feature store, to be asked again offline.

A request is compared where it was answered from the online store: those that brought all their features along have no
entity. An input that a client gave itself is left out; where a record does not say which those were, because an older
release wrote it, all of it is. Where a default stood in, nothing was read, so it counts as null.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa

from cluster.records.reading import is_faulty
from cluster.records.typed import column_of
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec
from feature_jobs.store.definitions.views import DTYPES
from feature_jobs.store.types.dtypes import arrow_values, is_rich
from feature_jobs.store.types.schema import EVENT

TIME = pl.Datetime("us", "UTC")


@dataclass(kw_only=True, slots=True)
class Served:
    """Rows that one version answered, with the same inputs given by the client."""

    version: int
    given: tuple[str, ...]
    ids: list[tuple[str, int]] = field(default_factory=list)
    """Prediction and row within it."""
    entities: list[dict[str, Any]] = field(default_factory=list)
    as_of: list[dt.datetime] = field(default_factory=list)
    requested: list[dt.datetime] = field(default_factory=list)
    features: dict[str, list[Any]] = field(default_factory=dict)

    def column(self, name: str, spec: FieldSpec) -> pl.Series:
        """What was served of a feature, in its own dtype."""
        if is_rich(spec.dtype):
            return pl.Series(name, pl.from_arrow(arrow_values(self.features[name], spec.dtype)))
        wanted = pl.Series(pl.from_arrow(pa.array([], DTYPES[spec.dtype]))).dtype
        # By the feature's type, which the values may not be of. The online store gives a time as its microseconds.
        logged = "int64" if spec.dtype == "timestamp" else spec.dtype
        return column_of(name, self.features[name], logged)[0].cast(wanted)

    def asked(self, spec: ServiceSpec) -> pa.Table:
        """The entity rows: keys and `event_timestamp`.

        A key that was read from an earlier view is the one that was served, so that the views are judged one by one.
        """
        columns: dict[str, Any] = {key: [one[key] for one in self.entities] for key in self.entities[0]}
        for view in spec.views:
            for one in view.fields:
                name = f"{view.name}__{one.name}"
                is_key = any(one.name in other.join_keys for other in spec.views)
                if is_key and one.name not in columns and name in self.features and name not in self.given:
                    columns[one.name] = self.column(name, one).to_arrow()
        return pa.table({**columns, EVENT: pa.array(self.as_of, DTYPES["timestamp"])})


class Requests(NamedTuple):
    """What a log has."""

    groups: list[Served]
    """The requests that can be asked again."""
    left_out: int
    """Rows of predictions that cannot."""
    without_score: int
    """Rows of requests that the model gave no answer to."""


def served(records: Iterable[Mapping[str, Any]], since: dt.datetime | None) -> Requests:
    """The requests in a log."""
    groups: dict[tuple[int, tuple[str, ...], tuple[str, ...]], Served] = {}
    left_out = without_score = 0
    for record in _since(records, since):
        if is_faulty(record):
            without_score += len(record["entities"])
            continue
        keys = tuple(sorted(record["entities"][0])) if record["entities"] else ()
        if not keys or "given" not in record:
            left_out += len(record["entities"])
            continue
        given = tuple(record["given"])
        group = groups.setdefault(
            (record["version"], given, keys), Served(version=record["version"], given=given)
        )
        _add(group, record)
    return Requests(list(groups.values()), left_out, without_score)


def _since(records: Iterable[Mapping[str, Any]], since: dt.datetime | None) -> Iterator[Mapping[str, Any]]:
    for record in records:
        if since is None or dt.datetime.fromisoformat(record["time"]) >= since:
            yield record


def _add(group: Served, record: Mapping[str, Any]) -> None:
    count = len(record["entities"])
    group.ids.extend((record["prediction_id"], row) for row in range(count))
    group.entities.extend(record["entities"])
    group.as_of.extend([dt.datetime.fromisoformat(record["as_of"])] * count)
    group.requested.extend([dt.datetime.fromisoformat(record["time"])] * count)
    defaulted = record.get("defaulted", {})
    for name, values in record["features"].items():
        stood_in = set(defaulted.get(name, ()))
        read = (
            [None if row in stood_in else value for row, value in enumerate(values)] if stood_in else values
        )
        group.features.setdefault(name, []).extend(read)
