"""The point-in-time join of two frames, with the feature store's search. The store itself joins files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import polars as pl

from feature_jobs.store.offline.newest_rows import NewestRows, sort_entities
from feature_jobs.store.offline.point_in_time import JoinResult, microseconds, order_of, take_or_null
from feature_jobs.store.types.schema import EVENT


def join_features(
    entities: pl.DataFrame,
    features: pl.DataFrame,
    *,
    keys: Sequence[str],
    columns: Sequence[str],
    ttl: timedelta | None,
    cutoff: bool = True,
    ordered: bool = False,
) -> JoinResult:
    """Join each entity row with the features that were known at its time.

    Args:
        entities: join keys and `event_timestamp`, in any order, repetitions allowed; same dtypes as in `features`.
        features: join keys, `event_timestamp`, `created_timestamp`, `ingest_seq` (unique) and the feature columns;
            also `deleted` if there may be tombstones.
        keys: join keys. A null key matches nothing.
        columns: feature columns to return.
        ttl: greatest age at which a value is valid. An older value is expired.
        cutoff: whether to hide rows that were created after the entity row's time. If false, only event times are
            compared.
        ordered: whether `features` is already sorted by (available, event, created, seq). Then `ingest_seq` is
            optional.
    """
    by_entity = sort_entities(entities.select(*keys, EVENT), keys)
    search = NewestRows(by_entity, ttl_us=microseconds(ttl), cutoff=cutoff)
    search.add(features, order=None if ordered else order_of(features))
    found = search.found()
    rows, absent = np.empty_like(found.row), np.empty_like(found.absent)
    rows[by_entity.order], absent[by_entity.order] = found.row, found.absent
    return JoinResult(
        columns=take_or_null(features.select(columns), rows, absent),
        hidden=found.hidden,
        absent=pl.Series(absent),
    )
