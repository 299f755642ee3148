"""Read logged predictions as requests to the feature store, to repeat these requests offline.

Only requests that read the online store are compared. A request that contained all features has no entity. Inputs that
the client sent are left out. A record of an earlier release does not say which inputs these were, so the whole record
is left out. If a default replaced a missing feature, the store gave no value, so null is compared.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa

from cluster.records.reading import is_faulty
from cluster.records.signature_types import column_of
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec
from feature_jobs.store.definitions.views import DTYPES
from feature_jobs.store.types.dtypes import is_rich, to_arrow
from feature_jobs.store.types.schema import EVENT

TIME = pl.Datetime("us", "UTC")


@dataclass(kw_only=True, slots=True)
class ServedRequests:
    """Rows of requests that one model version answered, all with the same inputs sent by the client."""

    version: int
    client_inputs: tuple[str, ...]
    """Names of the inputs that the client sent."""
    ids: list[tuple[str, int]] = field(default_factory=list)
    """Prediction id, and index of the row in that prediction."""
    entities: list[dict[str, Any]] = field(default_factory=list)
    as_of: list[dt.datetime] = field(default_factory=list)
    requested: list[dt.datetime] = field(default_factory=list)
    """Time of the request."""
    features: dict[str, list[Any]] = field(default_factory=dict)

    def column(self, name: str, spec: FieldSpec) -> pl.Series:
        """Return the served values of a feature with the feature's dtype."""
        if is_rich(spec.dtype):
            return pl.Series(name, pl.from_arrow(to_arrow(self.features[name], spec.dtype)))
        dtype = pl.Series(pl.from_arrow(pa.array([], DTYPES[spec.dtype]))).dtype
        # The values may have another type than the feature. The online store returns a time as microseconds.
        logged = "int64" if spec.dtype == "timestamp" else spec.dtype
        return column_of(name, self.features[name], logged)[0].cast(dtype)

    def entity_rows(self, spec: ServiceSpec) -> pa.Table:
        """Return the entity rows: join keys and `event_timestamp`.

        If a join key is a feature of an earlier view, the served value is used, so that each view is compared on its
        own.
        """
        columns: dict[str, Any] = {key: [row[key] for row in self.entities] for key in self.entities[0]}
        for view in spec.views:
            for feature in view.fields:
                name = f"{view.name}__{feature.name}"
                is_key = any(feature.name in other.join_keys for other in spec.views)
                is_read = name in self.features and name not in self.client_inputs
                if is_key and feature.name not in columns and is_read:
                    columns[feature.name] = self.column(name, feature).to_arrow()
        return pa.table({**columns, EVENT: pa.array(self.as_of, DTYPES["timestamp"])})


class LoggedRequests(NamedTuple):
    """The content of a log."""

    groups: list[ServedRequests]
    """The requests that can be repeated."""
    left_out: int
    """Number of rows of predictions that cannot be repeated."""
    without_score: int
    """Number of rows of requests for which the model gave no score."""


def read_served(records: Iterable[Mapping[str, Any]], since: dt.datetime | None) -> LoggedRequests:
    """Read the requests from the records of a log, grouped by version, inputs and join keys.

    Args:
        records: records of the prediction log.
        since: time of the first request to read; None for all.
    """
    groups: dict[tuple[int, tuple[str, ...], tuple[str, ...]], ServedRequests] = {}
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
            (record["version"], given, keys), ServedRequests(version=record["version"], client_inputs=given)
        )
        _add(group, record)
    return LoggedRequests(list(groups.values()), left_out, without_score)


def _since(records: Iterable[Mapping[str, Any]], since: dt.datetime | None) -> Iterator[Mapping[str, Any]]:
    for record in records:
        if since is None or dt.datetime.fromisoformat(record["time"]) >= since:
            yield record


def _add(group: ServedRequests, record: Mapping[str, Any]) -> None:
    """Append the rows of a record. A feature that a default replaced becomes null."""
    count = len(record["entities"])
    group.ids.extend((record["prediction_id"], row) for row in range(count))
    group.entities.extend(record["entities"])
    group.as_of.extend([dt.datetime.fromisoformat(record["as_of"])] * count)
    group.requested.extend([dt.datetime.fromisoformat(record["time"])] * count)
    defaulted = record.get("defaulted", {})
    for name, values in record["features"].items():
        rows = set(defaulted.get(name, ()))
        if rows:
            values = [None if row in rows else value for row, value in enumerate(values)]
        group.features.setdefault(name, []).extend(values)
