"""The trials of a sweep, computed from its events in the ledger. A pure function of the events."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent, SweepFinished, TrialFinished, TrialReported, TrialStarted

MAX_STARTS = 3
"""A trial that was started this often has failed when its process is lost."""


class Status(enum.Enum):
    """State of a trial."""

    running = "running"
    finished = "finished"
    stopped = "stopped"
    """Ended early with a loss: by the scheduler, or by the time budget."""
    failed = "failed"


@dataclass(kw_only=True, slots=True)
class Trial:
    """One trial of a sweep."""

    number: int
    """From 1."""
    parameters: dict[str, Any]
    """The searched hyper-parameters."""
    status: Status = Status.running
    losses: dict[int, float] = field(default_factory=dict)
    """Finite validation losses by rung: the number of the report, from 1."""
    starts: int = 1
    """How often the trial was started."""
    reason: str = ""
    """Type of the error of a failed trial."""
    cause: str | None = None
    """The error in one line. It is not in the ledger, because it may contain values of rows."""

    @property
    def loss(self) -> float | None:
        """Smallest loss; None if the trial has none, or has failed."""
        return None if self.status is Status.failed else min(self.losses.values(), default=None)

    @property
    def has_ended(self) -> bool:
        return self.status is not Status.running

    @property
    def last_rung(self) -> int:
        return max(self.losses, default=0)

    def add_report(self, rung: int, loss: float | None) -> None:
        """Keep the loss of a rung; None is a loss that is not finite."""
        self.losses = with_report(self.losses, rung, loss)

    def describe_parameters(self) -> str:
        """Return the parameters as text."""
        return " ".join(f"{name}={_short(value)}" for name, value in self.parameters.items())

    def as_result(self) -> dict[str, Any]:
        """Return the trial with JSON values, for the ledger and for the sweep's output."""
        return {
            "trial": self.number,
            "parameters": self.parameters,
            "status": self.status.value,
            "validation_loss": self.loss,
            "rungs": {str(rung): loss for rung, loss in self.losses.items()},
            "reason": self.reason,
        }


def read_trials(ledger: Ledger, *, model: str, run: str) -> dict[int, Trial]:
    """Return the trials of a sweep by number, as the ledger has them."""
    kinds: tuple[type[LedgerEvent], ...] = (TrialStarted, TrialReported, TrialFinished)
    entries = [entry for kind in kinds for entry in ledger.find(kind, model=model, run=run)]
    return fold(entry.event() for entry in sorted(entries, key=lambda entry: entry.seq))


def find_finished(ledger: Ledger, *, model: str, run: str) -> SweepFinished | None:
    """Return the event of a finished sweep, or None."""
    entry = ledger.newest(SweepFinished, model=model, run=run)
    event = None if entry is None else entry.event()
    assert event is None or isinstance(event, SweepFinished)
    return event


def fold(events: Iterable[LedgerEvent]) -> dict[int, Trial]:
    """Return the trials by number, after the events of one sweep in order.

    A trial that starts again begins without losses. So do workers that report their first rung again. Reports of
    unknown or ended trials change nothing.
    """
    trials: dict[int, Trial] = {}
    for event in events:
        match event:
            case TrialStarted():
                known = trials.get(event.trial)
                if known is None:
                    trials[event.trial] = Trial(number=event.trial, parameters=event.parameters)
                elif not known.has_ended:
                    known.losses, known.starts = {}, known.starts + 1
            case TrialReported():
                known = trials.get(event.trial)
                if known is not None and not known.has_ended:
                    known.add_report(event.rung, event.loss)
            case TrialFinished():
                known = trials.get(event.trial)
                if known is not None and not known.has_ended:
                    known.status, known.reason = Status(event.status), event.reason
            case _:
                pass
    return dict(sorted(trials.items()))


def with_report(losses: Mapping[int, float], rung: int, loss: float | None) -> dict[int, float]:
    """Return the losses by rung after a report.

    Workers that are started again begin at rung 1. Then the losses of the earlier workers do not count any more.

    Args:
        losses: Losses by rung so far.
        rung: The number of the report.
        loss: Its loss; None is a loss that is not finite.
    """
    earlier = {one: known for one, known in losses.items() if one < rung}
    return earlier if loss is None else earlier | {rung: loss}


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """Return the trial with the smallest loss, of equal ones the first; None if none has a loss."""
    with_loss = [trial for trial in trials if trial.has_ended and trial.loss is not None]
    return min(with_loss, key=lambda trial: (_loss(trial), trial.number), default=None)


def _loss(trial: Trial) -> float:
    return math.inf if trial.loss is None else trial.loss


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
