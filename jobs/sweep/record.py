"""Append the events of a sweep to the ledger, and keep its trials."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from cluster.errors import TrainingFailed, first_line
from cluster.ledger import Ledger
from cluster.ledger.events import (
    LedgerEvent,
    SweepFinished,
    SweepStarted,
    TrialFinished,
    TrialReported,
    TrialStarted,
)
from jobs.sweep.history import Status, Trial, best_trial, find_finished, read_trials
from jobs.train.progress import METRIC
from jobs.train.run.identity import require_same_settings

FLUSH_S = 60.0
"""Seconds to wait at the end of the trials until the ledger has all events."""
_RETRY_S = 0.5
NO_ANSWER = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError)
"""Errors of a database that does not answer, or that does not take writes now."""


@dataclass(kw_only=True)
class SweepRecord:
    """One sweep in the ledger."""

    ledger: Ledger
    model: str
    run: str
    """Id of the sweep."""
    family: str
    settings: Mapping[str, Any]
    """Everything that determines the trials."""
    actor: str
    """Name of the caller."""
    trials: dict[int, Trial] = field(default_factory=dict)
    """Trials by number."""
    _waiting: deque[LedgerEvent] = field(default_factory=deque, init=False, repr=False)

    def start(self) -> bool:
        """Record the start and read the trials. Return whether the sweep was started before.

        Raises:
            ConfigError: It was started with other settings or other data. The message names one that differs.
        """
        entry = self.ledger.newest(SweepStarted, model=self.model, run=self.run)
        if entry is not None:
            require_same_settings(
                entry.payload["settings"], self.settings, what=f"Sweep '{self.run}' of model '{self.model}'"
            )
        event = SweepStarted(model=self.model, run=self.run, family=self.family, settings=dict(self.settings))
        self.ledger.append_once(event, actor=self.actor, model=self.model, run=self.run)
        self.trials = read_trials(self.ledger, model=self.model, run=self.run)
        return entry is not None

    def finished(self) -> SweepFinished | None:
        """Return the event of the finished sweep, or None."""
        return find_finished(self.ledger, model=self.model, run=self.run)

    def trial_started(self, number: int, parameters: dict[str, Any]) -> Trial:
        """Record that a trial started, for the first time or again."""
        self._append(TrialStarted(model=self.model, run=self.run, trial=number, parameters=parameters))
        starts = self.trials[number].starts + 1 if number in self.trials else 1
        self.trials[number] = Trial(number=number, parameters=parameters, starts=starts)
        return self.trials[number]

    def trial_reported(self, trial: Trial, rung: int, loss: float) -> None:
        """Record a validation loss."""
        finite = loss if math.isfinite(loss) else None
        trial.add_report(rung, finite)
        self._append(
            TrialReported(model=self.model, run=self.run, trial=trial.number, rung=rung, loss=finite)
        )

    def trial_ended(
        self, trial: Trial, status: Status, *, reason: str = "", cause: str | None = None
    ) -> None:
        """Record the end of a trial, once. A trial without a finite loss has failed.

        Args:
            trial: The trial.
            status: How it ended.
            reason: Type of the error.
            cause: The error in one line, which the ledger does not get.
        """
        if trial.has_ended:
            return
        if not trial.losses and status is not Status.failed:
            status, reason, cause = Status.failed, reason or "NoLoss", cause or f"has no finite {METRIC}"
        trial.status, trial.reason, trial.cause = status, reason, cause
        self._append(
            TrialFinished(
                model=self.model,
                run=self.run,
                trial=trial.number,
                status=status.value,
                loss=trial.loss,
                reason=reason,
            )
        )

    def _append(self, event: LedgerEvent) -> None:
        """Append an event of a trial. While the ledger does not answer, the events wait in memory, in their order.

        Otherwise a trial would fail because its end could not be recorded.
        """
        self._waiting.append(event)
        try:
            self._append_waiting()
        except NO_ANSWER as error:
            if len(self._waiting) == 1:
                print(f"the ledger does not answer: {first_line(error)}. The sweep goes on.", flush=True)

    def _append_waiting(self) -> None:
        while self._waiting:
            self.ledger.append(self._waiting[0], actor=self.actor)
            self._waiting.popleft()

    def flush(self, *, timeout_s: float = FLUSH_S) -> None:
        """Append the events that wait for the ledger.

        Raises:
            TrainingFailed: The ledger does not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._append_waiting()
            except NO_ANSWER as error:
                if time.monotonic() > deadline:
                    raise TrainingFailed(
                        f"The ledger does not answer: {first_line(error)}. `run={self.run}` continues the sweep. It "
                        "repeats the trials whose end the ledger does not have."
                    ) from None
            time.sleep(_RETRY_S)

    def finish(self, *, training_set_hash: str) -> SweepFinished:
        """Record the result of the sweep, or return the recorded one. One trial at least must have a loss."""
        best = best_trial(self.trials.values())
        assert best is not None
        event = SweepFinished(
            model=self.model,
            family=self.family,
            trials=sum(trial.loss is not None for trial in self.trials.values()),
            metric=METRIC,
            best=best.parameters,
            results=[trial.as_result() for trial in self.trials.values()],
            training_set_hash=training_set_hash,
            run=self.run,
            best_trial=best.number,
        )
        if self.ledger.append_once(event, actor=self.actor, model=self.model, run=self.run) is None:
            recorded = self.finished()
            assert recorded is not None
            return recorded
        return event
