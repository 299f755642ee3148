"""Metrics of a rollout from predictions and outcomes. Each unit enters a metric once, when its outcome window is over.

Units are taken in **cohorts**: those whose first request in the experiment was in the same span of time, a quarter of
the outcome window. A cohort is complete when the window of its last unit is over, and when all nodes have shared their
records until then. A pass reads the predictions and outcomes of one cohort by columns, and stores the units, the sums
of their values and the number of the cohort in one transaction. So a pass that is killed changes nothing, and a pass
that is repeated counts nothing twice. Both arms have the same window.

A unit's value is the mean over its answered rows in its window whose outcome arrived in it. A unit without such a row
does not enter. If one arm loses outcomes, its units are missing, and the test of the sample ratio finds it.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.ledger import Ledger
from cluster.ledger.database import updating
from cluster.records.columns import OTHER
from cluster.records.edge_counts.database import ensure_tables, evidence_engine
from cluster.records.location import outcome_log, prediction_log
from cluster.records.progress import log_age
from cluster.runtime import OutcomeParser, Task
from cluster.runtime.signature import ModelSignature
from cluster.security.keys.store import KeyStore
from cluster.statistics.moments import Moments
from cluster.statistics.quality import Quality, accuracy, brier, squared_error, unit_means
from cluster.storage import Layout
from serve_apps.rollout.assignment import Arm
from serve_apps.rollout.evidence.log_spans import LogSpans
from serve_apps.rollout.evidence.metric_tables import add_cohort, known_units, next_cohort

COHORTS_IN_WINDOW = 4
MIN_COHORT_S = 1.0
_ARMS = (Arm.treatment.value, Arm.control.value)
_PREDICTION_COLUMNS = (
    "prediction_id",
    "time",
    "version",
    "rollout",
    "arm",
    "unit_hash",
    "predictions",
    OTHER,
)
_OUTCOME_COLUMNS = ("prediction_id", "row", "outcome", "received_at")
_TASKS = {
    Quality.brier: (Task.binary, Task.multiclass),
    Quality.accuracy: (Task.binary, Task.multiclass),
    Quality.squared_error: (Task.regression,),
}

Signatures = Callable[[int], ModelSignature]
"""Function that returns the signature of a version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutMetrics:
    """Metrics of one rollout, fixed before its start."""

    rollout: str
    model: str
    started_at: dt.datetime
    outcome_window_s: float
    """Time after a unit's first request in which its requests and their outcomes count, in seconds."""
    qualities: Mapping[str, Quality]
    """How each metric is scored, by its name."""
    squared_error_limit: float = 1.0
    """Greatest squared error that is counted."""

    def __post_init__(self) -> None:
        for name in ("outcome_window_s", "squared_error_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}.")

    @property
    def window(self) -> dt.timedelta:
        return dt.timedelta(seconds=self.outcome_window_s)

    def cohort_start(self, number: int) -> dt.datetime:
        """Return when a cohort begins; it ends when the next one begins."""
        length_s = max(MIN_COHORT_S, self.outcome_window_s / COHORTS_IN_WINDOW)
        return self.started_at + dt.timedelta(seconds=number * length_s)


class _Answer(NamedTuple):
    """One logged prediction of the experiment."""

    prediction_id: str
    time: dt.datetime
    version: int
    unit: str
    predictions: str


@dataclass(kw_only=True, slots=True)
class _UnitRows:
    """What a cohort knows of one unit."""

    arm: str
    first: dt.datetime
    answers: list[_Answer] = field(default_factory=list)


class OutcomeReader:
    """Reads the cohorts of one rollout.

    Args:
        ledger: The ledger.
        places: Where the logs are.
        store: Gives the keys of the logs.
        signatures: Returns the signature of a version of the model.
        metrics: The rollout's metrics.
    """

    def __init__(
        self,
        ledger: Ledger,
        places: Layout,
        store: KeyStore,
        *,
        signatures: Signatures,
        metrics: RolloutMetrics,
    ) -> None:
        self._engine = evidence_engine(ledger.engine)
        self._metrics = metrics
        self._signatures = signatures
        self._parsers: dict[int, OutcomeParser] = {}
        self._logs = [of(places, ledger, metrics.model) for of in (prediction_log, outcome_log)]
        self._predictions = LogSpans(self._logs[0], store, time="time")
        self._outcomes = LogSpans(self._logs[1], store, time="received_at")
        ensure_tables(self._engine)

    def collect(self, *, now: dt.datetime) -> bool:
        """Add the next cohort if it is complete. Return whether it was added; then another one may be complete.

        Raises:
            LogMoved: A log was compacted meanwhile. Nothing was stored; call this again.
            RecordLogCorrupt, ProtectedFileCorrupt, AccessDenied, KeyRevoked: The logs cannot be read.
            SQLAlchemyError: The database does not answer. Nothing was stored.
        """
        metrics = self._metrics
        with self._engine.connect() as connection:
            number = next_cohort(connection, metrics.rollout)
        since, end = metrics.cohort_start(number), metrics.cohort_start(number + 1)
        until = end + metrics.window
        if now < until or min(log_age(log).until for log in self._logs) < until:
            return False
        units = self._units(since, end, until)
        outcomes = self._outcomes_of(units, since, until)
        values = {name: self._values(units, outcomes, quality) for name, quality in metrics.qualities.items()}
        with updating(self._engine) as connection:
            return add_cohort(connection, metrics.rollout, number=number, units=units.keys(), values=values)

    def _units(self, since: dt.datetime, end: dt.datetime, until: dt.datetime) -> dict[str, _UnitRows]:
        """Return the cohort's units with their answers in their windows."""
        found: dict[str, _UnitRows] = {}
        for rows in self._predictions.read(since, until, _PREDICTION_COLUMNS):
            for row in _experiment_rows(rows, self._metrics.rollout):
                answer = _Answer(
                    row["prediction_id"], row["time"], row["version"], row["unit_hash"], row["predictions"]
                )
                unit = found.setdefault(answer.unit, _UnitRows(arm=row["arm"], first=answer.time))
                unit.first = min(unit.first, answer.time)
                if not _has_fault(row[OTHER]):
                    unit.answers.append(answer)
        with self._engine.connect() as connection:
            known = known_units(connection, self._metrics.rollout, list(found))
        cohort = {name: unit for name, unit in found.items() if unit.first < end and name not in known}
        for unit in cohort.values():
            closed = unit.first + self._metrics.window
            unit.answers = [answer for answer in unit.answers if answer.time < closed]
        return cohort

    def _outcomes_of(
        self, units: Mapping[str, _UnitRows], since: dt.datetime, until: dt.datetime
    ) -> dict[tuple[str, int], Any]:
        """Return the last valid outcome of each row that arrived within its unit's window."""
        closes = {
            answer.prediction_id: (unit.first + self._metrics.window, answer.version)
            for unit in units.values()
            for answer in unit.answers
        }
        found: dict[tuple[str, int], tuple[dt.datetime, Any]] = {}
        for rows in self._outcomes.read(since, until, _OUTCOME_COLUMNS):
            for row in rows.to_pylist():
                closed, version = closes.get(row["prediction_id"], (None, 0))
                if closed is None or row["received_at"] >= closed or row["outcome"] is None:
                    continue
                value = self._parser(version).parse(orjson.loads(row["outcome"]))
                key = (row["prediction_id"], row["row"] or 0)
                if value is not None and (key not in found or found[key][0] <= row["received_at"]):
                    found[key] = (row["received_at"], value)
        return {key: value for key, (_, value) in found.items()}

    def _parser(self, version: int) -> OutcomeParser:
        if version not in self._parsers:
            self._parsers[version] = OutcomeParser(self._signatures(version))
        return self._parsers[version]

    def _values(
        self, units: Mapping[str, _UnitRows], outcomes: Mapping[tuple[str, int], Any], quality: Quality
    ) -> dict[Arm, Moments]:
        """Return the sums of the units' values, by arm."""
        scored: dict[str, list[tuple[str, float]]] = {arm: [] for arm in _ARMS}
        for name, unit in units.items():
            for answer in unit.answers:
                signature = self._signatures(answer.version)
                if signature.task not in _TASKS[quality]:
                    continue
                for row, prediction in enumerate(orjson.loads(answer.predictions)):
                    outcome = outcomes.get((answer.prediction_id, row))
                    value = None if outcome is None else self._score(prediction, outcome, signature, quality)
                    if value is not None:
                        scored[unit.arm].append((name, value))
        moments = {}
        for arm, rows in scored.items():
            names, values = [name for name, _ in rows], [value for _, value in rows]
            moments[Arm(arm)] = Moments.of(unit_means(names, values)[1]) if rows else Moments()
        return moments

    def _score(
        self, prediction: Mapping[str, Any], outcome: Any, signature: ModelSignature, quality: Quality
    ) -> float | None:
        """Return one row's value; None if the answer has no finite score."""
        if quality is Quality.squared_error:
            limit = self._metrics.squared_error_limit
            value = prediction.get("value")
            return None if value is None else float(squared_error([value], [outcome], limit=limit)[0])
        classes = list(signature.classes or ())
        truth = classes.index(outcome)
        if quality is Quality.accuracy:
            label = OutcomeParser(signature).parse(prediction.get("label"))
            return None if label is None else float(accuracy([classes.index(label)], [truth])[0])
        if signature.task is Task.binary:
            scores: Any = prediction.get("probability")
        else:
            shares = prediction.get("probabilities") or {}
            scores = [shares.get(str(name)) for name in classes]
        if scores is None or (isinstance(scores, list) and None in scores):
            return None
        return float(brier(np.array([scores]), [truth])[0])


def _experiment_rows(rows: pa.Table, rollout: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of both arms of a rollout."""
    of_arms = pc.is_in(rows["arm"], value_set=pa.array(_ARMS))
    yield from rows.filter(pc.and_(of_arms, pc.equal(rows["rollout"], rollout))).to_pylist()


def _has_fault(other: str | None) -> bool:
    """Return whether a record says in its other fields that the model gave no answer."""
    return other is not None and bool(orjson.loads(other).get("fault"))
