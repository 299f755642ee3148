"""Select the rows of the reference that a version is compared with."""

from __future__ import annotations

import polars as pl

from cluster.errors import ConfigError, TrainingSetError, did_you_mean
from cluster.registry import ModelVersion
from jobs.monitor.config import MonitorConfig
from jobs.train.config import AUTO, SplitConfig
from jobs.train.data import TrainingSet
from jobs.train.split import version_held_out_mask


def reference_rows(source: TrainingSet, version: ModelVersion, config: MonitorConfig) -> pl.DataFrame:
    """Return the rows of the reference that a version was not fitted on, in order of time.

    Raises:
        TrainingSetError: A column is missing, or no row is left.
        ConfigError: `split.modulo` or `split.remainder` is set without `split.column`.
    """
    reference = pl.DataFrame(pl.from_arrow(source.table))
    if config.timestamp not in reference.columns:
        raise TrainingSetError(
            f"The reference has no column '{config.timestamp}'.{did_you_mean(config.timestamp, reference.columns)} "
            "Set `timestamp` to the column with the event time."
        )
    split = config.split or SplitConfig(column=None)
    if split.column == AUTO and split != SplitConfig():
        raise ConfigError(
            "split.modulo and split.remainder need `split.column` as well: with `auto` the split recorded with the "
            "version is used."
        )
    if split.column is not None:
        override = None if split.column == AUTO else split
        advice = "Give the training set, or set `split.column=null` for rows that no version was fitted on."
        mask = version_held_out_mask(version, source, override=override, advice=advice)
        reference = reference.filter(pl.Series(mask))
    if reference.is_empty():
        raise TrainingSetError(
            f"The training of version {version.version} held out no row of the reference. Give its training set, or "
            "set `split.column=null` for rows that no version was fitted on."
        )
    return reference.sort(config.timestamp)
