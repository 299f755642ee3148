"""A training set that is ready for a fit: split, signature, targets and statistics. The rows stay in their file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from cluster.errors import ConfigError
from cluster.runtime import ModelSignature
from jobs.train.config import LearningConfig
from jobs.train.data import TrainingSet, assign_parts
from jobs.train.inputs import learn_signature
from jobs.train.rows.encoded import EncodedRows, Part, Parts
from jobs.train.rows.statistics import Statistics, measure
from jobs.train.rows.target import Target, encode_target, label_column
from jobs.train.split import EVENT, Mask

MEMORY_LIMIT_BYTES = 2**31
"""A family with `fit` gets all rows in memory. If they need more than this, it is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """What the driver knows of the data. It has one number for each row, the target, and no inputs."""

    rows: EncodedRows
    """Reads the inputs by row groups, here or in a worker."""
    target: Target
    """For each row, the index of its class (int64), or its value in a regression (float64)."""
    statistics: Statistics
    num_conflicts: int = 0
    """Number of rows whose entity and time another row has, with another label."""

    @property
    def signature(self) -> ModelSignature:
        return self.rows.signature

    @property
    def parts(self) -> Parts:
        return self.rows.parts

    @property
    def fit(self) -> Mask:
        """Rows to fit the model on."""
        return np.asarray(self.parts == Part.fit)

    @property
    def validation(self) -> Mask:
        """Rows for early stopping."""
        return np.asarray(self.parts == Part.validation)

    @property
    def held_out(self) -> Mask:
        """Rows that fitting never uses; the model is evaluated on them."""
        return np.asarray(self.parts == Part.held_out)

    @property
    def unused(self) -> Mask:
        """Rows that nothing uses, because their outcome may still change."""
        return np.asarray(self.parts == Part.unused)

    def with_parts(self, parts: Parts) -> TrainingData:
        """Return the same data with another split. Signature and statistics stay."""
        return replace(self, rows=replace(self.rows, parts=parts))

    def with_target(self, target: Target) -> TrainingData:
        """Return the same rows with another target."""
        return replace(self, target=target, rows=replace(self.rows, replaced_target=target))


def prepare_rows(config: LearningConfig, source: TrainingSet, *, threshold: float = 0.5) -> TrainingData:
    """Split the rows, learn the model's signature, and measure the inputs in one pass over the row groups.

    Raises:
        TrainingSetError: A column is missing, or a part of the split has no rows.
    """
    parts = assign_parts(config, source)
    fit = parts == Part.fit
    signature = learn_signature(config, source, fit=fit, threshold=threshold)
    labels = label_column(source.table, config.label)
    target = encode_target(signature.task, labels, classes=signature.classes, label=config.label)
    rows = EncodedRows(rows=source.row_groups, signature=signature, parts=parts)
    statistics = measure(rows.groups(), fit=fit, width=signature.width)
    return TrainingData(
        rows=replace(rows, digests=statistics.digests),
        target=target,
        statistics=statistics,
        num_conflicts=count_conflicts(source, target),
    )


def require_room(data: TrainingData) -> None:
    """Require that all rows fit into memory, for a family with `fit`.

    Raises:
        ConfigError: They need more than `MEMORY_LIMIT_BYTES`.
    """
    num_bytes = 4 * len(data.parts) * data.signature.width
    if num_bytes > MEMORY_LIMIT_BYTES:
        raise ConfigError(
            f"All rows need {num_bytes / 2**30:.1f} GiB, and a family with `fit` gets at most "
            f"{MEMORY_LIMIT_BYTES / 2**30:.0f} GiB in memory. Write `build` and `loss` instead; see "
            "jobs/train/network/protocol.py."
        )


def count_conflicts(source: TrainingSet, target: Target) -> int:
    """Return the number of rows whose entity and time another row has, with another label.

    Without join keys or times, the result is 0.
    """
    keys = [name for name in source.join_keys if name in source.table.column_names]
    if not keys or EVENT not in source.table.column_names:
        return 0
    import polars as pl  # imported only where it is used

    columns = pa.table({name: source.table[name] for name in [*keys, EVENT]})
    table = pl.from_arrow(columns)
    assert isinstance(table, pl.DataFrame)
    hashes = table.hash_rows(seed=0).to_numpy()
    order = np.argsort(hashes, kind="stable")
    begins = np.flatnonzero(np.r_[True, hashes[order][1:] != hashes[order][:-1]])
    sizes = np.diff(np.r_[begins, len(order)])
    lowest = np.minimum.reduceat(target[order], begins)
    highest = np.maximum.reduceat(target[order], begins)
    return int(sizes[lowest != highest].sum())
