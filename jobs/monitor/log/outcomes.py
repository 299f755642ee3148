"""Find out which chunks an outcome belongs to, so that new outcomes reopen only these."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from cluster.records.columns import LINE, OTHER, SEGMENT
from cluster.records.schema import SHADOW
from jobs.monitor.log.index import Group, GroupCount, SegmentCount, day_of, normalise

ID_COLUMNS = ("prediction_id", "as_of", "version", "variant", "arm", "predictions", OTHER)
"""Columns of the prediction log's table that `prediction_ids` needs."""
COLUMNS = (SEGMENT, LINE, "prediction_id", "row")
"""Columns of the outcome log's table that `count_outcomes` needs."""
UNKNOWN = Group("", 0, "")
"""Group of the outcomes whose prediction is not in the log."""


class PredictionIds(NamedTuple):
    """The ids of answered predictions as hashes. If two ids have the same hash, a chunk is computed again in vain."""

    hashes: npt.NDArray[np.uint64]
    codes: npt.NDArray[np.uint32]
    """For each hash, the number of its group in `groups`."""
    groups: list[Group]


def prediction_ids(table: pa.Table) -> PredictionIds:
    """Return the ids of a table's records that have an answer. `table` has the columns `ID_COLUMNS`."""
    rows = normalise(pl.DataFrame(pl.from_arrow(table))).filter(
        pl.col("arm").ne_missing(SHADOW) & (pl.col("predictions") != "[]")
    )
    keys = rows.select("variant", "version", day_of("as_of").alias("day"))
    groups = keys.unique(maintain_order=True).with_row_index("code")
    codes = keys.join(
        groups, on=["variant", "version", "day"], how="left", nulls_equal=True, maintain_order="left"
    )
    return PredictionIds(
        hashes=rows["prediction_id"].hash().to_numpy(),
        codes=codes["code"].to_numpy().astype(np.uint32),
        groups=[
            Group(str(variant), int(version or 0), day) for _, variant, version, day in groups.iter_rows()
        ],
    )


def merge_ids(parts: Iterable[PredictionIds]) -> PredictionIds:
    """Return all ids, sorted by hash."""
    groups: dict[Group, int] = {}
    hashes, codes = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
    for part in parts:
        numbers = np.array([groups.setdefault(group, len(groups)) for group in part.groups], np.uint32)
        hashes.append(part.hashes)
        codes.append(numbers[part.codes] if len(part.codes) else part.codes)
    all_hashes, all_codes = np.concatenate(hashes), np.concatenate(codes)
    order = np.argsort(all_hashes)
    return PredictionIds(all_hashes[order], all_codes[order], list(groups))


def count_outcomes(table: pa.Table, ids: PredictionIds, seen: set[int]) -> dict[str, SegmentCount]:
    """Count the outcomes of a table by segment and group. A repeated outcome of an unknown prediction counts once.

    Args:
        table: Outcomes with the columns `COLUMNS`.
        ids: The ids of all answered predictions.
        seen: Hashes of the outcomes of unknown predictions in other tables of the log. Those of this one are added.
    """
    rows = pl.DataFrame(pl.from_arrow(table))
    hashes = rows["prediction_id"].hash().to_numpy()
    position = np.minimum(np.searchsorted(ids.hashes, hashes), max(len(ids.hashes) - 1, 0))
    codes = np.full(len(hashes), -1, np.int64)
    if len(ids.hashes):
        found = ids.hashes[position] == hashes
        codes[found] = ids.codes[position[found]]
    rows = rows.with_columns(pl.Series("_code", codes))
    unknown = rows.filter(pl.col("_code") < 0).unique(["prediction_id", "row"], maintain_order=True)
    unknown_hashes = unknown.select(pl.struct("prediction_id", "row").hash()).to_series().to_list()
    new = unknown.filter(pl.Series([one not in seen for one in unknown_hashes], dtype=pl.Boolean))
    seen.update(unknown_hashes)
    counted = pl.concat([rows.filter(pl.col("_code") >= 0), new])
    counts = {
        str(segment): SegmentCount(lines=lines + 1)
        for segment, lines in rows.group_by(SEGMENT, maintain_order=True).agg(pl.col(LINE).max()).iter_rows()
    }
    for segment, code, records in counted.group_by(SEGMENT, "_code", maintain_order=True).len().iter_rows():
        group = UNKNOWN if code < 0 else ids.groups[code]
        counts[segment].groups[group] = GroupCount(records=records)
    for segment in rows.filter(pl.col("_code") < 0)[SEGMENT].unique():
        # Also if all were seen before: the group says that new predictions may make them known.
        counts[segment].groups.setdefault(UNKNOWN, GroupCount())
    return counts
