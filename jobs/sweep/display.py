"""Show the trials while they run: a live table on a terminal, otherwise one line for each change of a trial."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from jobs.sweep.history import Status, Trial, best_trial
from jobs.train.progress import METRIC


class Display:
    """Shows changes of trials.

    Args:
        num_trials: Number of trials of the sweep.
        console: Where to write; None is the standard output.
    """

    def __init__(self, *, num_trials: int, console: Console | None = None) -> None:
        self._num_trials = num_trials
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._trials: dict[int, Trial] = {}
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, trial: Trial) -> None:
        """Show a trial that has changed."""
        self._trials[trial.number] = trial
        if self._live is not None:
            self._live.update(table(list(self._trials.values())))
        else:
            print(f"  trial {trial.number} of {self._num_trials}: {describe(trial)}", flush=True)


def describe(trial: Trial) -> str:
    """Return a trial in one line: parameters, status and losses."""
    parameters = trial.describe_parameters()
    match trial.status:
        case Status.failed:
            return f"{parameters}: failed: {trial.cause or trial.reason}"
        case Status.running if trial.losses:
            rung = trial.last_rung
            return f"{parameters}: report {rung}, {METRIC} {trial.losses[rung]:.4f}"
        case Status.running:
            return f"{parameters}: starts"
        case _:
            return f"{parameters}: {trial.status.value}, {METRIC} {trial.loss:.4f}"


def table(trials: list[Trial]) -> Table:
    """Return the table of all trials. The best one is bold."""
    best = best_trial(trials)
    shown = Table("trial", "parameters", "status", "reports", METRIC, box=None)
    for trial in sorted(trials, key=lambda trial: trial.number):
        loss = "" if trial.loss is None else f"{trial.loss:.4f}"
        cells = (trial.describe_parameters(), trial.status.value, str(trial.last_rung), loss)
        shown.add_row(str(trial.number), *cells, style="bold" if trial is best else None)
    return shown
