"""Explain why a served value of an aggregated view differs from the offline value.

The online store had at least the events that the last materialisation before the request could read. So the value is
computed again from those events, offline, at the request's `as_of`. Sums are exact, so equal values mean the same
events. Events that were pushed between the materialisation and the request cannot be distinguished from later events.
So if a later event with an earlier `created_timestamp` made the difference, the verdict is `mismatch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.offline.window_values import aggregate
from feature_jobs.store.skew.comparison import AS_OF, FLOOR_AS_OF, FLOOR_SEQ, POSITION, Verdict
from feature_jobs.store.types.schema import EVENT, SEQ

_AT_FLOOR, _ONLINE = "__held", "__online"


def explain_window_differences(
    requests: pl.DataFrame,
    events: pl.DataFrame,
    *,
    keys: Sequence[str],
    windows: WindowSpec,
    feature: str,
    online: pl.Series,
) -> pl.DataFrame:
    """Find out why served values of one aggregated feature differ from the offline values.

    Args:
        requests: the requests with a difference, as in `comparison.explain_differences`.
        events: all rows of the entities, as in `offline.window_values.aggregate`.
        keys: join keys.
        windows: the view's aggregations.
        feature: name of one feature of the view.
        online: the served value of each request, with the feature's dtype.

    Returns:
        `POSITION` and `verdict`, which is never `equal`.
    """
    of_feature = WindowSpec(
        event_id=windows.event_id,
        event_id_dtype=windows.event_id_dtype,
        outputs=tuple(output for output in windows.outputs if output.name == feature),
    )
    parts = requests.with_columns(online.alias(_ONLINE)).partition_by(FLOOR_SEQ, FLOOR_AS_OF)
    judged = pl.concat(_with_floor_values(part, events, keys, of_feature, feature) for part in parts)
    served, at_floor = pl.col(_ONLINE), pl.col(_AT_FLOOR)
    verdict = (
        pl.when(served.is_null() & at_floor.is_not_null())
        .then(pl.lit(Verdict.online_missing.value))
        .when(served.eq_missing(at_floor))
        .then(pl.lit(Verdict.lag.value))
        .when(at_floor.is_null())
        .then(pl.lit(Verdict.offline_missing.value))
        .otherwise(pl.lit(Verdict.mismatch.value))
    )
    return judged.select(POSITION, verdict.alias("verdict"))


def _with_floor_values(
    requests: pl.DataFrame, events: pl.DataFrame, keys: Sequence[str], windows: WindowSpec, feature: str
) -> pl.DataFrame:
    """Add the values that the events of the last materialisation give. It must be the same for all requests."""
    seq, as_of = requests.select(FLOOR_SEQ, FLOOR_AS_OF).row(0)
    if seq is None:
        return requests.with_columns(pl.lit(None, requests.schema[_ONLINE]).alias(_AT_FLOOR))
    known = events.filter((pl.col(SEQ) <= seq) & (as_of >= AVAILABLE))
    entities = requests.select(*keys, pl.col(AS_OF).alias(EVENT))
    values = aggregate(entities, known, keys=keys, windows=windows).columns[feature]
    return requests.with_columns(values.cast(requests.schema[_ONLINE]).alias(_AT_FLOOR))
