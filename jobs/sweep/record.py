"""Append the events of a sweep to the ledger, and keep its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.ledger import Ledger
from cluster.ledger.events import SweepFinished, SweepStarted, TrialFinished, TrialReported, TrialStarted
from jobs.sweep.history import Status, Trial, best_trial, find_finished, read_trials
from jobs.train.progress import METRIC
from jobs.train.run.identity import require_same_settings


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
        self.ledger.append(
            TrialStarted(model=self.model, run=self.run, trial=number, parameters=parameters),
            actor=self.actor,
        )
        starts = self.trials[number].starts + 1 if number in self.trials else 1
        self.trials[number] = Trial(number=number, parameters=parameters, starts=starts)
        return self.trials[number]

    def trial_reported(self, trial: Trial, rung: int, loss: float) -> None:
        """Record a validation loss."""
        is_finite = math.isfinite(loss)
        self.ledger.append(
            TrialReported(
                model=self.model,
                run=self.run,
                trial=trial.number,
                rung=rung,
                loss=loss if is_finite else None,
            ),
            actor=self.actor,
        )
        if is_finite:
            trial.losses[rung] = loss

    def trial_ended(
        self, trial: Trial, status: Status, *, reason: str = "", cause: str | None = None
    ) -> None:
        """Record the end of a trial. A trial without a finite loss has failed.

        Args:
            trial: The trial.
            status: How it ended.
            reason: Type of the error.
            cause: The error in one line, which the ledger does not get.
        """
        if not trial.losses and status is not Status.failed:
            status, reason, cause = Status.failed, reason or "NoLoss", cause or f"has no finite {METRIC}"
        trial.status, trial.reason, trial.cause = status, reason, cause
        self.ledger.append(
            TrialFinished(
                model=self.model,
                run=self.run,
                trial=trial.number,
                status=status.value,
                loss=trial.loss,
                reason=reason,
            ),
            actor=self.actor,
        )

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
