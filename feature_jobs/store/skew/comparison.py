"""Compare served features with the features from offline data. Pure functions over frames.

A served value is compared with the point-in-time join at the request's `as_of`, over all rows that are stored now. If
they differ, the history of the entity gives the cause:

- `lag`: the value is from an older row that the online store may still have had, or from a row that the table got
  later. One store is behind the other, but the values are the same.
- `online_missing`, `offline_missing`: one side has a value and the other has none, although both had the same rows.
- `mismatch`: both sides have a value, and the values differ. So they were computed in different ways.

The online store had at least the rows of the last materialisation before the request. So a row that is older than these
does not explain a value. After a push, the online store may have any newer row.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any

import polars as pl

from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.types.schema import CREATED, EVENT, INGESTED, SEQ

POSITION, AS_OF, REQUESTED = "__position", "__as_of", "__requested"
FLOOR_SEQ, FLOOR_AS_OF = "__floor_seq", "__floor_as_of"
_ONLINE, _OFFLINE, _EXPLAINED = "__online", "__known", "__excused"
_VALUE, _AVAILABLE, _RANK = "__value", "__available", "__rank"
_VISIBLE, _FRESH, _AT_FLOOR = "__visible", "__fresh", "__at_floor"


class Verdict(enum.StrEnum):
    """Result of the comparison of one served value."""

    equal = "equal"
    lag = "lag"
    online_missing = "online_missing"
    offline_missing = "offline_missing"
    mismatch = "mismatch"


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSkew:
    """Number of served values of a feature by verdict, and their error."""

    equal: int = 0
    lag: int = 0
    online_missing: int = 0
    offline_missing: int = 0
    mismatch: int = 0
    error_sum: float = 0.0
    """Sum of the terms of `smape`."""
    error_count: int = 0
    """Number of these terms: one per pair of numbers."""

    @property
    def compared(self) -> int:
        """Number of served values that were compared."""
        return self.equal + self.lag + self.online_missing + self.offline_missing + self.mismatch

    @property
    def smape(self) -> float | None:
        """Symmetric mean absolute percentage error as a share, 0 to 2; None for features that are not numbers.

        It is the mean of 2 |o - f| / (|o| + |f|), with 0 if both are 0 (Armstrong, Long-Range Forecasting, 1985,
        p. 348).
        """
        return self.error_sum / self.error_count if self.error_count else None

    def report(self) -> dict[str, Any]:
        """Return the counts and the error for reports and events."""
        counts = {name: value for name, value in asdict(self).items() if not name.startswith("error")}
        return {"compared": self.compared, **counts, "smape": self.smape}

    def __add__(self, other: FeatureSkew) -> FeatureSkew:
        return FeatureSkew(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )


def differs(online: pl.Series, offline: pl.Series) -> pl.Series:
    """Return one bool per row: true if the values differ. Two nulls are equal. Both series must have one dtype."""
    return online.ne_missing(offline)


def feature_skew(online: pl.Series, offline: pl.Series, verdicts: pl.Series) -> FeatureSkew:
    """Return the counts and the error of one feature.

    Args:
        online: served values.
        offline: values of the point-in-time join.
        verdicts: verdict on each value.
    """
    counts = {str(verdict): int((verdicts == verdict).sum()) for verdict in Verdict}
    if not online.dtype.is_numeric():
        return FeatureSkew(**counts)
    pair = pl.DataFrame({"o": online.cast(pl.Float64), "f": offline.cast(pl.Float64)}).drop_nulls()
    size = pair["o"].abs() + pair["f"].abs()
    terms = (2 * (pair["o"] - pair["f"]).abs() / size).fill_nan(0.0)
    return FeatureSkew(**counts, error_sum=float(terms.sum()), error_count=pair.height)


_VERDICT = (
    pl.when(pl.col(_ONLINE).is_null() & pl.col(_OFFLINE).is_not_null())
    .then(pl.lit(Verdict.online_missing.value))
    .when(pl.col(_ONLINE).is_null() | pl.col(_EXPLAINED))
    .then(pl.lit(Verdict.lag.value))
    .when(pl.col(_OFFLINE).is_null())
    .then(pl.lit(Verdict.offline_missing.value))
    .otherwise(pl.lit(Verdict.mismatch.value))
)


def explain_differences(
    requests: pl.DataFrame,
    history: pl.DataFrame,
    *,
    keys: Sequence[str],
    feature: str,
    online: pl.Series,
    ttl: timedelta | None,
) -> pl.DataFrame:
    """Find out why served values of one feature differ from the offline values.

    Args:
        requests: the requests with a difference: `POSITION` (unique), join keys, `AS_OF`, `REQUESTED` (UTC). For the
            last materialisation before the request: `FLOOR_SEQ` (the last `ingest_seq` it could read) and
            `FLOOR_AS_OF`. The last two are null if there was no materialisation.
        history: all rows of the entities: join keys, times, `ingest_seq`, `ingested_at` and the feature.
        keys: join keys.
        feature: column of the feature in `history`.
        online: the served value of each request, with the feature's dtype.
        ttl: TTL of the view.

    Returns:
        `POSITION` and `verdict`, which is never `equal`.
    """
    rows = _request_rows(requests.with_columns(online.alias(_ONLINE)), history, keys, feature, ttl)
    visible = pl.col(_VISIBLE).fill_null(False)
    stored = visible & (pl.col(INGESTED) <= pl.col(REQUESTED))
    floor = pl.col(_RANK).filter(visible & pl.col(_AT_FLOOR)).max()
    newest = pl.col(_RANK).filter(stored).max()
    offline_value = pl.col(_VALUE).filter(stored & (pl.col(_RANK) == newest) & pl.col(_FRESH)).first()
    explains = (
        visible
        & pl.col(_FRESH)
        & (pl.col(_VALUE) == pl.col(_ONLINE))
        & (floor.is_null() | (pl.col(_RANK) >= floor))
    )
    judged = rows.group_by(POSITION, maintain_order=True).agg(
        pl.col(_ONLINE).first(), offline_value.alias(_OFFLINE), explains.any().alias(_EXPLAINED)
    )
    return judged.select(POSITION, _VERDICT.alias("verdict"))


def _request_rows(
    requests: pl.DataFrame,
    history: pl.DataFrame,
    keys: Sequence[str],
    feature: str,
    ttl: timedelta | None,
) -> pl.DataFrame:
    """Join each request with all rows of its entity, with each row's rank and its state at the request.

    `_VISIBLE`: the row was available at `AS_OF`. `_FRESH`: it was not expired. `_AT_FLOOR`: the last materialisation
    before the request could read it.
    """
    ranked = (
        history.select(*keys, EVENT, CREATED, SEQ, INGESTED, pl.col(feature).alias(_VALUE))
        .sort(EVENT, CREATED, SEQ)
        .with_row_index(_RANK)
        .with_columns(AVAILABLE.alias(_AVAILABLE))
    )
    return requests.join(ranked, on=list(keys), how="left", maintain_order="left_right").with_columns(
        (pl.col(_AVAILABLE) <= pl.col(AS_OF)).alias(_VISIBLE),
        (pl.lit(True) if ttl is None else pl.col(EVENT) >= pl.col(AS_OF) - ttl).alias(_FRESH),
        ((pl.col(SEQ) <= pl.col(FLOOR_SEQ)) & (pl.col(_AVAILABLE) <= pl.col(FLOOR_AS_OF))).alias(_AT_FLOOR),
    )
