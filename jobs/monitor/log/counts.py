"""Bring the index of both logs of a model up to date, and answer which records belong to a chunk.

Only new units are read. Files of the prediction log's table are counted in Ray tasks. Segments, and the ids that assign
outcomes to chunks, are read by this process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.placement import PlacementConfig, find_nodes, options
from cluster.records.location import LogLocation
from cluster.security.keys.access import KeyAccess
from jobs.monitor.config import Period
from jobs.monitor.kept import KeptFiles
from jobs.monitor.log import index as predictions_index
from jobs.monitor.log import outcomes as outcomes_index
from jobs.monitor.log.index import Group, HourCount, count_records
from jobs.monitor.log.outcomes import UNKNOWN, count_outcomes, merge_ids, prediction_ids
from jobs.monitor.log.units import Index, IndexedUnit, OpenLog, Unit, index_table, read_units, unchanged

NAME = "index.sealed"
_DAY_LENGTHS = {Period.year: 4, Period.month: 7, Period.day: 10}


@dataclass(kw_only=True, slots=True)
class ChunkContent:
    """Which records a chunk of one version under one variant has."""

    records: dict[str, int] = field(default_factory=dict)
    """Number of records by segment of the prediction log."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Number of outcomes by segment of the outcome log."""
    answered: int = 0
    """Number of answered rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogCounts:
    """The index of both logs of a model."""

    predictions: OpenLog
    outcomes: OpenLog
    prediction_index: Index
    outcome_index: Index

    def chunks(self, period: Period) -> dict[tuple[str, int], dict[str, ChunkContent]]:
        """Return the content of each chunk by variant and version, in order of the variants' first records."""
        versions: dict[tuple[str, int], dict[str, ChunkContent]] = {}
        for segment, group, count in sorted(_groups(self.prediction_index), key=lambda one: one[0]):
            chunk = _chunk(versions, group, period)
            chunk.records[segment] = chunk.records.get(segment, 0) + count.records
            chunk.answered += count.answered
        for segment, group, count in _groups(self.outcome_index):
            if group != UNKNOWN and (group.variant, group.version) in versions:
                chunk = _chunk(versions, group, period)
                chunk.outcomes[segment] = chunk.outcomes.get(segment, 0) + count.records
        return {key: dict(sorted(chunks.items())) for key, chunks in versions.items()}

    def failed(self, variant: str, version: int) -> int:
        """Return the number of rows of a version without a finite score."""
        groups = _groups(self.prediction_index)
        return sum(
            count.failed for _, group, count in groups if (group.variant, group.version) == (variant, version)
        )

    @property
    def unknown_predictions(self) -> int:
        """Number of outcomes whose prediction is not in the log."""
        return sum(count.records for _, group, count in _groups(self.outcome_index) if group == UNKNOWN)

    def hours(self) -> dict[str, HourCount]:
        """Return the traffic of all versions by hour."""
        total: dict[str, HourCount] = {}
        for unit in self.prediction_index.values():
            for segment in unit.segments.values():
                for hour, count in segment.hours.items():
                    one = total.setdefault(hour, HourCount())
                    one.requests += count.requests
                    one.refused += count.refused
                    one.entities += count.entities
                    one.unseen += count.unseen
        return dict(sorted(total.items()))


def count_logs(
    predictions: LogLocation,
    outcomes: LogLocation,
    access: KeyAccess,
    kept: KeptFiles,
    placement: PlacementConfig,
    attach: Callable[[], object],
) -> LogCounts:
    """Count what is new in both logs, keep the counts, and return all.

    Args:
        predictions: The prediction log.
        outcomes: The outcome log.
        access: Access to the logs' keys.
        kept: The kept files of the model.
        placement: Where tasks may run.
        attach: Attaches this process to Ray. It is called only if a file must be counted.

    Raises:
        ProtectedFileCorrupt, RecordLogCorrupt: A file or record was changed.
        AccessDenied, KeyRevoked: The key store refuses the key.
    """
    content = kept.read(NAME)
    # Outcomes first: a prediction is logged before its outcome, so each listed outcome's prediction is listed too.
    outcome_log, prediction_log = OpenLog(outcomes, access), OpenLog(predictions, access)
    known = unchanged(_index(content.get("predictions", {})), prediction_log.units)
    new = [unit for unit in prediction_log.units if unit.name not in known]
    count_of_files = _start_counting(prediction_log, new, placement, access, attach)
    known_outcomes = unchanged(_index(content.get("outcomes", {})), outcome_log.units)
    if new or any(unit.name not in known_outcomes for unit in outcome_log.units):
        # New predictions may make them known, and new outcomes may repeat them.
        known_outcomes = {name: unit for name, unit in known_outcomes.items() if not _has_unknown(unit)}
    new_outcomes = [unit for unit in outcome_log.units if unit.name not in known_outcomes]
    if new_outcomes:
        ids = merge_ids(
            prediction_ids(table)
            for _, table in _tables(prediction_log, prediction_log.units, access, outcomes_index.ID_COLUMNS)
        )
        count = functools.partial(count_outcomes, ids=ids, seen=set())
        for unit, table in _tables(outcome_log, new_outcomes, access, outcomes_index.COLUMNS):
            known_outcomes[unit.name] = index_table(table, unit.mark, count)
    known |= _count_segments(prediction_log, new) | count_of_files()
    if new or new_outcomes:
        kept.write(NAME, {"predictions": _as_json(known), "outcomes": _as_json(known_outcomes)})
    return LogCounts(
        predictions=prediction_log,
        outcomes=outcome_log,
        prediction_index=known,
        outcome_index=known_outcomes,
    )


def run_options(log: OpenLog, placement: PlacementConfig) -> dict[str, Any]:
    """Return the options of tasks that read a log's table."""
    reason = None if log.location.shared is not None else "the log is on its disk"
    return dict(options(find_nodes(placement, on_this_node=reason)))


def _start_counting(
    log: OpenLog,
    new: Sequence[Unit],
    placement: PlacementConfig,
    access: KeyAccess,
    attach: Callable[[], object],
) -> Callable[[], Index]:
    """Start the tasks that count new files. Return a function that waits for their counts.

    Meanwhile this process assigns the outcomes.
    """
    files = [unit.file for unit in new if unit.file is not None]
    if not files:
        return dict
    attach()
    from jobs.monitor.log.tasks import start_counting  # imports Ray

    return start_counting(log.location.root, files, access, run_options(log, placement))


def _count_segments(log: OpenLog, new: Sequence[Unit]) -> Index:
    return {
        unit.name: index_table(
            log.read_segment(unit.name, predictions_index.COLUMNS), unit.mark, count_records
        )
        for unit in new
        if unit.file is None
    }


def _tables(
    log: OpenLog, units: Sequence[Unit], access: KeyAccess, columns: Sequence[str]
) -> Iterator[tuple[Unit, Any]]:
    """Yield each unit with its records."""
    for unit in units:
        if unit.file is None:
            yield unit, log.read_segment(unit.name, columns)
        else:
            for _, table in read_units(log.location.root, [unit.file], access, columns):
                yield unit, table


def _groups(index: Index) -> Iterator[tuple[str, Group, Any]]:
    for unit in index.values():
        for segment, counts in unit.segments.items():
            for group, count in counts.groups.items():
                yield segment, group, count


def _chunk(
    versions: dict[tuple[str, int], dict[str, ChunkContent]], group: Group, period: Period
) -> ChunkContent:
    chunks = versions.setdefault((group.variant, group.version), {})
    return chunks.setdefault(chunk_of_day(group.day, period), ChunkContent())


def chunk_of_day(day: str, period: Period) -> str:
    """Return the name of the chunk that a day belongs to."""
    return day[: _DAY_LENGTHS[period]]


def _has_unknown(unit: IndexedUnit) -> bool:
    return any(UNKNOWN in segment.groups for segment in unit.segments.values())


def _index(data: dict[str, Any]) -> Index:
    return {name: IndexedUnit.from_json(one) for name, one in data.items()}


def _as_json(index: Index) -> dict[str, Any]:
    return {name: unit.to_json() for name, unit in index.items()}
