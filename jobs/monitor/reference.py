"""Find the reference of a version, and select the rows of it that the version is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import polars as pl

from cluster.errors import ConfigError, TrainingSetError, did_you_mean
from cluster.registry import ModelVersion
from cluster.storage import resolve, sha256
from jobs.monitor.config import MonitorConfig
from jobs.train.config import AUTO, SplitConfig
from jobs.train.data import TrainingSet
from jobs.train.version_rows import held_out_rows, recorded_training_set, require_same_rows


class References:
    """Reads the reference of each version: the configured file, or the version's own training set."""

    def __init__(self, configured: str | None, read: Callable[[str], TrainingSet]) -> None:
        """Keep what is needed to read.

        Args:
            configured: Path of the reference of all versions; None takes each version's own.
            read: Reads a training set.
        """
        self._configured = configured
        self._read = functools.cache(read)
        self._file_hash = functools.cache(sha256)

    def of(self, version: ModelVersion) -> Reference:
        """Return the reference of a version.

        Raises:
            TrainingSetError: The file is missing, is not known, or is not what the version was trained on any more.
        """
        path, is_recorded = self.path_of(version)
        source = self._read(path)
        if is_recorded:
            require_same_rows(version, source, path=path, option="reference")
        return Reference(path, source)

    def path_of(self, version: ModelVersion) -> ReferencePath:
        """Return the path of a version's reference, without reading the file.

        Raises:
            TrainingSetError: The training set of the version is not known.
        """
        if self._configured is not None:
            return ReferencePath(self._configured, is_recorded=False)
        return ReferencePath(recorded_training_set(version), is_recorded=True)

    def file_hash(self, path: str) -> str:
        """Return the SHA-256 of a reference's file. It is read once for all versions and variants."""
        return self._file_hash(resolve(path))


class ReferencePath(NamedTuple):
    """Where a reference is."""

    path: str
    is_recorded: bool
    """Whether the version was trained on it."""


class Reference(NamedTuple):
    """A training set with its path."""

    path: str
    source: TrainingSet


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
        mask = held_out_rows(version, source, override=override, advice=advice)
        reference = reference.filter(pl.Series(mask))
    if reference.is_empty():
        raise TrainingSetError(
            f"The training of version {version.version} held out no row of the reference. Give its training set, or "
            "set `split.column=null` for rows that no version was fitted on."
        )
    return reference.sort(config.timestamp)
