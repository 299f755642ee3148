"""Whether the features that were served are those that offline data gives: pure comparison of frames.

A served value is held against the point-in-time join at the request's own `as_of`, over all that is stored by now.
Where they differ, the cause is looked for in the history of the entity:

- `lag`: the value is that of an older row, one that the online store may still have held, or of one that offline got to
  know later. The store is behind, or ahead, but the values are the same.
- `online_missing`, `offline_missing`: one side had a value where the other, with the same knowledge, has none.
- `mismatch`: both have one, and it is another: the value was made in two ways.

The online store held at least what the last materialisation before the request put there, so no older row than that one
excuses a value; after a push it may hold any newer one.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any

import polars as pl

from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.types.schema import CREATED, EVENT, SEQ

POSITION, AS_OF, REQUESTED = "__position", "__as_of", "__requested"
FLOOR_SEQ, FLOOR_AS_OF = "__floor_seq", "__floor_as_of"
INGESTED = "ingested_at"
_ONLINE, _RANK, _FRESH, _AT_FLOOR = "__online", "__rank", "__fresh", "__at_floor"


class Verdict(enum.StrEnum):
    """What became of one served value."""

    equal = "equal"
    lag = "lag"
    online_missing = "online_missing"
    offline_missing = "offline_missing"
    mismatch = "mismatch"


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSkew:
    """How often a feature's served values came to which verdict."""

    equal: int = 0
    lag: int = 0
    online_missing: int = 0
    offline_missing: int = 0
    mismatch: int = 0
    error_sum: float = 0.0
    """Sum of the terms of SMAPE."""
    error_count: int = 0
    """Pairs of numbers that it is over."""

    @property
    def compared(self) -> int:
        """Served values that were held against offline ones."""
        return self.equal + self.lag + self.online_missing + self.offline_missing + self.mismatch

    @property
    def smape(self) -> float | None:
        """Symmetric mean absolute percentage error as a share, 0 to 2: mean of 2 |o - f| / (|o| + |f|), 0 where both
        are 0 (Armstrong, Long-Range Forecasting, 1985, p. 348); none for features that are no numbers."""
        return self.error_sum / self.error_count if self.error_count else None

    def report(self) -> dict[str, Any]:
        """For people and events."""
        counts = {name: value for name, value in asdict(self).items() if not name.startswith("error")}
        return {"compared": self.compared, **counts, "smape": self.smape}

    def __add__(self, other: FeatureSkew) -> FeatureSkew:
        return FeatureSkew(
            **{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)}
        )


def differing(online: pl.Series, offline: pl.Series) -> pl.Series:
    """Where a served value is not the offline one; both null is the same. Of one dtype."""
    return online.ne_missing(offline)


def skew_of(online: pl.Series, offline: pl.Series, verdicts: pl.Series) -> FeatureSkew:
    """Counts and error of one feature.

    Args:
        online: as served.
        offline: as joined now.
        verdicts: of each.
    """
    counts = {str(one): int((verdicts == one).sum()) for one in Verdict}
    if not online.dtype.is_numeric():
        return FeatureSkew(**counts)
    pair = pl.DataFrame({"o": online.cast(pl.Float64), "f": offline.cast(pl.Float64)}).drop_nulls()
    size = pair["o"].abs() + pair["f"].abs()
    terms = (2 * (pair["o"] - pair["f"]).abs() / size).fill_nan(0.0)
    return FeatureSkew(**counts, error_sum=float(terms.sum()), error_count=pair.height)


_VERDICT = (
    pl.when(pl.col(_ONLINE).is_null() & pl.col("__known").is_not_null())
    .then(pl.lit(Verdict.online_missing.value))
    .when(pl.col(_ONLINE).is_null() | pl.col("__excused"))
    .then(pl.lit(Verdict.lag.value))
    .when(pl.col("__known").is_null())
    .then(pl.lit(Verdict.offline_missing.value))
    .otherwise(pl.lit(Verdict.mismatch.value))
)


def judge(
    asked: pl.DataFrame,
    history: pl.DataFrame,
    *,
    keys: Sequence[str],
    feature: str,
    online: pl.Series,
    ttl: timedelta | None,
) -> pl.DataFrame:
    """Why served values of one feature are not the offline ones.

    Args:
        asked: the differing requests: `POSITION` (unique), the keys, `AS_OF`, `REQUESTED` (UTC), and of the last
            materialisation before, null where there was none, `FLOOR_SEQ` (the last `ingest_seq` it could read) and
            `FLOOR_AS_OF`.
        history: all rows of the entities: keys, times, `ingest_seq`, `ingested_at` and the feature.
        keys: that identify an entity.
        feature: its column in `history`.
        online: what was served for each of `asked`, of the feature's dtype.
        ttl: of the view.

    Returns:
        `POSITION` and `verdict`, never `equal`.
    """
    known = (
        history.select(*keys, EVENT, CREATED, SEQ, INGESTED, pl.col(feature).alias("__value"))
        .sort(EVENT, CREATED, SEQ)
        .with_row_index(_RANK)
        .with_columns(AVAILABLE.alias("__available"))
    )
    rows = (
        asked.with_columns(online.alias(_ONLINE))
        .join(known, on=list(keys), how="left", maintain_order="left_right")
        .with_columns(
            _AT=pl.col("__available") <= pl.col(AS_OF),
            **{
                _FRESH: pl.lit(True) if ttl is None else pl.col(EVENT) >= pl.col(AS_OF) - ttl,
                _AT_FLOOR: (pl.col(SEQ) <= pl.col(FLOOR_SEQ))
                & (pl.col("__available") <= pl.col(FLOOR_AS_OF)),
            },
        )
    )
    visible = pl.col("_AT").fill_null(False)
    stored = visible & (pl.col(INGESTED) <= pl.col(REQUESTED))
    floor = pl.col(_RANK).filter(visible & pl.col(_AT_FLOOR)).max()
    newest = pl.col(_RANK).filter(stored).max()
    value = pl.col("__value").filter(stored & (pl.col(_RANK) == newest) & pl.col(_FRESH)).first()
    same = (
        visible
        & pl.col(_FRESH)
        & (pl.col("__value") == pl.col(_ONLINE))
        & (floor.is_null() | (pl.col(_RANK) >= floor))
    )
    found = rows.group_by(POSITION, maintain_order=True).agg(
        pl.col(_ONLINE).first(), value.alias("__known"), same.any().alias("__excused")
    )
    return found.select(POSITION, _VERDICT.alias("verdict"))
