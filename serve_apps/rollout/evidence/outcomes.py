"""Metrics of a rollout from predictions and outcomes. Each unit enters a metric once, when its outcome window is over.

Units are taken in **cohorts**: those whose first request in the experiment was in the same span of time, a quarter of
the outcome window. A cohort is complete when the window of its last unit is over, and when all nodes have shared their
records until then. A pass reads the predictions and outcomes of one cohort by columns, and stores the units, the sums
of their values and the number of the cohort in one transaction. So a pass that is killed changes nothing, and a pass
that is repeated counts nothing twice. Both arms have the same window.

A unit's value is the mean over its answered rows in its window whose outcome arrived in it. A unit without such a row
does not enter. If one arm loses outcomes, its units are missing, and the test of the sample ratio finds it. Other forms
are in `unit_values`. The units of a shadow are those whose requests were copied.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from cluster.ledger import Ledger
from cluster.ledger.database import updating
from cluster.records.edge_counts.database import ensure_tables, evidence_engine
from cluster.records.location import outcome_log, prediction_log
from cluster.records.progress import log_age
from cluster.security.keys.store import KeyStore
from cluster.statistics.policy import Form
from cluster.storage import Layout
from serve_apps.rollout.evidence.cohorts import (
    COLUMNS,
    EXPERIMENT,
    MIRRORED,
    UnitRows,
    experiment_rows,
    units_of_arms,
    units_of_shadow,
)
from serve_apps.rollout.evidence.log_spans import LogSpans
from serve_apps.rollout.evidence.metric_rules import Scoring
from serve_apps.rollout.evidence.metric_tables import (
    CohortResult,
    add_cohort,
    add_shadow_counts,
    known_units,
    next_cohort,
)
from serve_apps.rollout.evidence.paired import require_same_inputs
from serve_apps.rollout.evidence.pairing import Models, Rescorer, pairs_of_copies
from serve_apps.rollout.evidence.scoring import Scorer, Signatures
from serve_apps.rollout.evidence.shadow_counts import count_events
from serve_apps.rollout.evidence.unit_values import CohortValues

COHORTS_IN_WINDOW = 4
MIN_COHORT_S = 1.0
COPY_S = 10.0
"""A copy may be answered so long after its request. Requests in the last seconds of a unit's window are left out, or
only their fast copies would count. It is at most a tenth of the window."""
_OUTCOME_COLUMNS = ("prediction_id", "row", "outcome", "received_at")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutMetrics:
    """Metrics of one rollout, fixed before its start."""

    rollout: str
    model: str
    started_at: dt.datetime
    scoring: Scoring
    treatment: int = 0
    """Number of the version that is tried; paired metrics and shadows need it."""
    champion: int = 0

    def __post_init__(self) -> None:
        for name in ("outcome_window_s", "squared_error_limit"):
            if not 0 < getattr(self.scoring, name) < math.inf:
                raise ValueError(
                    f"{name} must be a finite number above 0, got {getattr(self.scoring, name)}."
                )

    @property
    def window(self) -> dt.timedelta:
        return dt.timedelta(seconds=self.scoring.outcome_window_s)

    @property
    def request_window(self) -> dt.timedelta:
        """Time after a unit's first request in which its requests count."""
        if self.scoring.shadow is None:
            return self.window
        return self.window - min(dt.timedelta(seconds=COPY_S), self.window / 10)

    @property
    def rescores(self) -> bool:
        """Whether the version that did not answer must score the logged features."""
        return self.scoring.shadow is None and any(rule.form is Form.paired for rule in self.scoring.rules)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the prediction log that the rules need."""
        reads = self.rescores or any(rule.covariate for rule in self.scoring.rules) or self.scoring.segments
        return (*COLUMNS, *(("features",) if reads else ()))

    def cohort_start(self, number: int) -> dt.datetime:
        """Return when a cohort begins; it ends when the next one begins."""
        length_s = max(MIN_COHORT_S, self.scoring.outcome_window_s / COHORTS_IN_WINDOW)
        return self.started_at + dt.timedelta(seconds=number * length_s)


class OutcomeReader:
    """Reads the cohorts of one rollout.

    Args:
        ledger: The ledger.
        places: Where the logs are.
        store: Gives the keys of the logs.
        signatures: Returns the signature of a version of the model.
        metrics: The rollout's metrics.
        models: Returns a version, loaded. None if no metric is paired.

    Raises:
        RolloutError: The versions cannot score each other's requests, and a metric is paired.
    """

    def __init__(
        self,
        ledger: Ledger,
        places: Layout,
        store: KeyStore,
        *,
        signatures: Signatures,
        metrics: RolloutMetrics,
        models: Models | None = None,
    ) -> None:
        self._engine = evidence_engine(ledger.engine)
        self._metrics = metrics
        self._scorer = Scorer(signatures, squared_error_limit=metrics.scoring.squared_error_limit)
        self._pairs_of = pairs_of_copies
        if metrics.rescores and models is not None:
            require_same_inputs(signatures(metrics.treatment), signatures(metrics.champion))
            self._pairs_of = Rescorer(
                models, treatment=metrics.treatment, champion=metrics.champion, since=metrics.started_at
            ).pairs
        self._logs = [of(places, ledger, metrics.model) for of in (prediction_log, outcome_log)]
        self._predictions = LogSpans(self._logs[0], store, time="time")
        self._outcomes = LogSpans(self._logs[1], store, time="received_at")
        ensure_tables(self._engine)

    def collect(self, *, now: dt.datetime) -> bool:
        """Take the next cohort if it is complete. Return whether it was taken; then another one may be complete.

        Raises:
            LogMoved: A log was compacted meanwhile. Nothing was stored; call this again.
            RecordLogCorrupt, ProtectedFileCorrupt, AccessDenied, KeyRevoked: The logs cannot be read.
            SQLAlchemyError: The database does not answer. Nothing was stored.
        """
        metrics, shadow = self._metrics, self._metrics.scoring.shadow
        with self._engine.connect() as connection:
            number = next_cohort(connection, metrics.rollout)
        since, end = metrics.cohort_start(number), metrics.cohort_start(number + 1)
        until = end + metrics.window
        if now < until or min(log_age(log).until for log in self._logs) < until:
            return False
        units = self._units(since, end, until)
        outcomes = self._outcomes_of(units, since, until)
        values = CohortValues(self._scorer, outcomes, pairs_of=self._pairs_of)
        sums = values.sums(units, metrics.scoring)
        events = {} if shadow is None else count_events(units, shadow, self._scorer)
        with updating(self._engine) as connection:
            result = add_cohort(connection, metrics.rollout, number=number, units=units.keys(), values=sums)
            if result is CohortResult.added:
                add_shadow_counts(connection, metrics.rollout, events)
        return result is not CohortResult.already

    def _units(self, since: dt.datetime, end: dt.datetime, until: dt.datetime) -> dict[str, UnitRows]:
        """Return the cohort's units with their answers in their windows."""
        metrics, is_shadow = self._metrics, self._metrics.scoring.shadow is not None
        arms = MIRRORED if is_shadow else EXPERIMENT
        rows = (
            row
            for table in self._predictions.read(since, until, metrics.columns)
            for row in experiment_rows(table, metrics.rollout, arms)
        )
        found = units_of_shadow(rows, version=metrics.treatment) if is_shadow else units_of_arms(rows)
        with self._engine.connect() as connection:
            known = known_units(connection, metrics.rollout, list(found))
        cohort = {name: unit for name, unit in found.items() if unit.first.time < end and name not in known}
        for unit in cohort.values():
            closed = unit.first.time + metrics.request_window
            unit.answers = [answer for answer in unit.answers if answer.time < closed]
        return cohort

    def _outcomes_of(
        self, units: Mapping[str, UnitRows], since: dt.datetime, until: dt.datetime
    ) -> dict[tuple[str, int], Any]:
        """Return the last valid outcome of each row that arrived within its unit's window."""
        if not any(rule.is_quality for rule in self._metrics.scoring.rules):
            return {}
        closes = {
            answer.prediction_id: (unit.first.time + self._metrics.window, answer.version)
            for unit in units.values()
            for answer in unit.answers
        }
        found: dict[tuple[str, int], tuple[dt.datetime, Any]] = {}
        for rows in self._outcomes.read(since, until, _OUTCOME_COLUMNS):
            for row in rows.to_pylist():
                closed, version = closes.get(row["prediction_id"], (None, 0))
                if closed is None or row["received_at"] >= closed or row["outcome"] is None:
                    continue
                value = self._scorer.parser(version).parse(orjson.loads(row["outcome"]))
                key = (row["prediction_id"], row["row"] or 0)
                if value is not None and (key not in found or found[key][0] <= row["received_at"]):
                    found[key] = (row["received_at"], value)
        return {key: value for key, (_, value) in found.items()}
