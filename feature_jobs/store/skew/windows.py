"""Why a served value of an aggregated view is not the offline one: the counterpart of `skew.judge`.

What the online store held is at least the events that the last materialisation before the request could read. So the
value is made from those once more, offline, at the request's own instant. Sums are exact, so equal means equal. Events
that were pushed between the two are not told apart from later ones, so where a still later one (with an earlier
`created_timestamp`) made the difference, it is called a mismatch.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.offline.windows import aggregate
from feature_jobs.store.skew.comparison import AS_OF, FLOOR_AS_OF, FLOOR_SEQ, POSITION, Verdict
from feature_jobs.store.types.schema import EVENT, SEQ

_HELD, _ONLINE = "__held", "__online"


def judge_windows(
    asked: pl.DataFrame,
    events: pl.DataFrame,
    *,
    keys: Sequence[str],
    windows: WindowSpec,
    feature: str,
    online: pl.Series,
) -> pl.DataFrame:
    """Verdicts on values of one feature that differ from the offline ones.

    Args:
        asked: the requests, as of `skew.judge`.
        events: all rows of the entities, as of `windows.aggregate`.
        keys: that identify an entity.
        windows: the view's.
        feature: one of its outputs.
        online: what was served for each of `asked`, of the feature's dtype.

    Returns:
        `POSITION` and `verdict`, never `equal`.
    """
    wanted = WindowSpec(
        event_id=windows.event_id,
        event_id_dtype=windows.event_id_dtype,
        outputs=tuple(output for output in windows.outputs if output.name == feature),
    )
    parts = asked.with_columns(online.alias(_ONLINE)).partition_by(FLOOR_SEQ, FLOOR_AS_OF)
    judged = pl.concat(_with_held(part, events, keys, wanted, feature) for part in parts)
    given, held = pl.col(_ONLINE), pl.col(_HELD)
    verdict = (
        pl.when(given.is_null() & held.is_not_null())
        .then(pl.lit(Verdict.online_missing.value))
        .when(given.eq_missing(held))
        .then(pl.lit(Verdict.lag.value))
        .when(held.is_null())
        .then(pl.lit(Verdict.offline_missing.value))
        .otherwise(pl.lit(Verdict.mismatch.value))
    )
    return judged.select(POSITION, verdict.alias("verdict"))


def _with_held(
    part: pl.DataFrame, events: pl.DataFrame, keys: Sequence[str], windows: WindowSpec, feature: str
) -> pl.DataFrame:
    """Requests after one materialisation, with the values that its state gives."""
    seq, as_of = part.select(FLOOR_SEQ, FLOOR_AS_OF).row(0)
    if seq is None:
        return part.with_columns(pl.lit(None, part.schema[_ONLINE]).alias(_HELD))
    held = events.filter((pl.col(SEQ) <= seq) & (as_of >= AVAILABLE))
    entities = part.select(*keys, pl.col(AS_OF).alias(EVENT))
    values = aggregate(entities, held, keys=keys, windows=windows).columns[feature]
    return part.with_columns(values.cast(part.schema[_ONLINE]).alias(_HELD))
