"""LightGBM data sets that are filled row group by row group. LightGBM keeps about one byte for each value."""

from __future__ import annotations

from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt

from jobs.train.rows.encoded import EncodedGroup, EncodedRows, Part

Values = npt.NDArray[np.float64]


class GroupSequence(lightgbm.Sequence):
    """The rows of one part in one row group. LightGBM asks for them twice: for a sample, and for all values."""

    def __init__(self, loader: GroupLoader, group: int, num_rows: int) -> None:
        self._loader, self._group, self._num_rows = loader, group, num_rows
        self.batch_size = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int | slice | list[int]) -> Values:
        return self._loader.load(self._group).matrix[index].astype(np.float64)


class GroupLoader:
    """Reads the rows of one part, keeps the last group, and collects the target of all groups that were read."""

    def __init__(self, rows: EncodedRows, part: Part) -> None:
        self._rows, self._part = rows, part
        self._loaded: tuple[int, EncodedGroup] | None = None
        self.counts = rows.counts(part)
        self.target = np.empty(sum(self.counts), np.float32)
        """Target in LightGBM's own type. It is complete when each group was loaded once."""

    def load(self, group: int) -> EncodedGroup:
        """Return the rows of one group."""
        if self._loaded is None or self._loaded[0] != group:
            self._loaded = group, self._rows.read(group).of(self._part)
            begin = sum(self.counts[:group])
            self.target[begin : begin + self.counts[group]] = self._loaded[1].target
        return self._loaded[1]


def build_dataset(
    rows: EncodedRows, part: Part, *, settings: dict[str, Any], reference: lightgbm.Dataset | None = None
) -> lightgbm.Dataset:
    """Return the rows of one part as LightGBM's data set. At most one row group is in memory beside it.

    Args:
        rows: All rows.
        part: The part to use.
        settings: LightGBM's settings.
        reference: Data set whose bins are used. It is needed for validation rows.
    """
    loader = GroupLoader(rows, part)
    sequences = [GroupSequence(loader, group, count) for group, count in enumerate(loader.counts) if count]
    dataset = lightgbm.Dataset(
        sequences,
        loader.target,  # LightGBM reads it after all rows, so it is complete then
        reference=reference,
        categorical_feature=rows.signature.categorical,
        params=settings,
        free_raw_data=False,  # the sequences hold no rows; LightGBM refuses to use a data set twice without them
    )
    dataset.construct()
    dataset.label, loader.target = None, np.empty(0, np.float32)  # the data set has its own copy
    return dataset


def add_raw_scores(booster: lightgbm.Booster, rows: EncodedRows, scores: dict[Part, Values]) -> None:
    """Add a model's raw scores to those of the rows of some parts, float64 [rows] or [rows, classes]."""
    positions = dict.fromkeys(scores, 0)
    for group in rows.groups():
        for part, values in scores.items():
            chosen = group.of(part).matrix
            if len(chosen):
                begin = positions[part]
                positions[part] = end = begin + len(chosen)
                values[begin:end] += booster.predict(chosen, raw_score=True)
