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
    """Reads the rows of one part. It keeps the last group."""

    def __init__(self, rows: EncodedRows, part: Part) -> None:
        self._rows, self._part = rows, part
        self._loaded: tuple[int, EncodedGroup] | None = None

    def load(self, group: int) -> EncodedGroup:
        """Return the rows of one group."""
        if self._loaded is None or self._loaded[0] != group:
            self._loaded = group, self._rows.read(group).of(self._part)
        return self._loaded[1]

    def groups(self) -> list[int]:
        """Return the groups that have rows of the part."""
        return [group for group, count in enumerate(self._rows.counts(self._part)) if count]


def build_dataset(
    rows: EncodedRows,
    part: Part,
    target: npt.NDArray[Any],
    *,
    settings: dict[str, Any],
    reference: lightgbm.Dataset | None = None,
) -> lightgbm.Dataset:
    """Return the rows of one part as LightGBM's data set. At most one row group is in memory beside it.

    Args:
        rows: All rows.
        part: The part to use.
        target: Target of the rows of the part, in order.
        settings: LightGBM's settings.
        reference: Data set whose bins are used. It is needed for validation rows.
    """
    loader, counts = GroupLoader(rows, part), rows.counts(part)
    sequences = [GroupSequence(loader, group, counts[group]) for group in loader.groups()]
    dataset = lightgbm.Dataset(
        sequences,
        target,
        reference=reference,
        categorical_feature=rows.signature.categorical,
        params=settings,
        free_raw_data=False,  # the sequences hold no rows; LightGBM refuses to use a data set twice without them
    )
    return dataset.construct()


def predict_raw(booster: lightgbm.Booster, rows: EncodedRows, part: Part) -> Values:
    """Return the raw scores of the rows of one part, float64 [rows] or [rows, classes]."""
    loader = GroupLoader(rows, part)
    parts = [booster.predict(loader.load(group).matrix, raw_score=True) for group in loader.groups()]
    return np.concatenate(parts)
