"""Progress of a fit: workers send reports, and the driver prints them.

The reports are sent through a Ray queue, because the fit runs in other processes. On a terminal, a progress bar shows
the latest report. If the output is not a terminal, a line is printed for each report, in a long run about twenty lines.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.util.queue import Empty, Queue
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.train.run.identity import RunClaimed

METRIC = "validation_loss"
"""Metric that selects the best epoch and the best trial."""
RUNG = "rung"
"""Metric of a trial: the number of its report, from 1. A fit whose workers are started again reports them again."""
LINES = 20
"""If the output is not a terminal, one run prints at most about this many lines."""
_POLL_S = 0.2
"""Seconds to wait for a report before the driver checks whether the fit has ended."""
_CLAIM_S = 15.0
"""Seconds to wait until a killed job has released its run."""
_NAMESPACE = "training_runs"
_JOIN_TIMEOUT_S = 10.0
"""Timeout in seconds for printing the last reports after the fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Progress of a fit."""

    completed: int
    """Number of completed epochs or rounds."""
    losses: dict[str, float]
    """Losses by name."""
    is_whole: bool = True
    """Whether an epoch or round has just been completed. If not, only a terminal shows the report."""
    step: str = ""
    """Steps of the epoch that are done, such as `20/48`; empty if there are no steps."""
    rows_per_s: float = 0.0
    """Rows of all workers per second; 0 if unknown."""
    remaining_s: float | None = None
    """Estimated seconds until the end; None if unknown."""


ShowReport = Callable[[Report], None]


@contextlib.contextmanager
def display_progress(*, unit: str, total: int, claim: Queue | None = None) -> Iterator[Queue]:
    """Yield a queue. Until the `with` block ends, print each report that is put into the queue.

    Args:
        unit: Name of what is counted: `epoch` or `round`.
        total: Largest possible number of epochs or rounds.
        claim: The queue of `claim_run`, which stays. By default, the block has a queue of its own.
    """
    queue = Queue(actor_options={"num_cpus": 0}) if claim is None else claim
    finished = threading.Event()

    def show_reports(show: ShowReport) -> None:
        while True:
            is_last_pass = finished.is_set()
            try:
                while True:
                    show(queue.get(timeout=_POLL_S))
            except Empty:
                if is_last_pass:
                    return
            except RayError:
                return  # the queue's process died; the fit continues without it

    with _display(unit, total) as show:
        thread = threading.Thread(target=show_reports, args=(show,), daemon=True)
        thread.start()
        try:
            yield queue
        finally:
            finished.set()
            thread.join(_JOIN_TIMEOUT_S)
            if claim is None:
                queue.shutdown(force=True)  # also ends the thread if the queue's process never started


@contextlib.contextmanager
def claimed_run(run: str) -> Iterator[Queue]:
    """Claim a run until the block ends, see `claim_run`. The block must read again what other jobs may have recorded.

    Raises:
        RunClaimed: Another job has the run.
    """
    claim = claim_run(run)
    try:
        yield claim
    finally:
        claim.shutdown(force=True)


def claim_run(run: str) -> Queue:
    """Return a queue whose process has the run's name. The name is free again when the job that has it ends.

    Raises:
        RunClaimed: Another job has the run.
    """
    deadline = time.monotonic() + _CLAIM_S
    while True:
        try:
            return Queue(actor_options={"num_cpus": 0, "name": run, "namespace": _NAMESPACE})
        except ValueError as error:
            if time.monotonic() > deadline:
                raise RunClaimed(
                    f"Run '{run}' is running in another job. Wait for its end, or give another run=…"
                ) from error
            time.sleep(_POLL_S)


def send_report(reports: Queue, report: Report) -> None:
    """Put a report into the queue without waiting, because the queue's actor may still be starting."""
    actor: Any = reports.actor
    actor.put.remote(report)


def divergence_message(loss_name: str, value: float, when: str) -> str:
    """Return the error message for a loss that is NaN or infinite.

    Args:
        loss_name: Name of the loss.
        value: Value of the loss.
        when: Epoch or round, for example `epoch 1 of 8`.
    """
    return (
        f"The {loss_name} is {value} in {when}: the fit diverged. Lower model.learning_rate, or look for extreme "
        "values in the inputs and the label."
    )


def describe(report: Report, *, unit: str, total: int) -> str:
    """Return a report as one line."""
    return f"{unit} {report.completed} of {total}: {_losses_text(report)}"


def _losses_text(report: Report) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in report.losses.items())


def _details(report: Report) -> str:
    """Return step, rows per second and the remaining time, as far as they are known."""
    parts = [f"step {report.step}"] if report.step else []
    if report.rows_per_s:
        parts.append(f"{report.rows_per_s:,.0f} rows/s")
    if report.remaining_s is not None:
        parts.append(f"{report.remaining_s:.0f} s left")
    return ", ".join([*parts, _losses_text(report)])


@contextlib.contextmanager
def _display(unit: str, total: int) -> Iterator[ShowReport]:
    """Yield a function that shows a report on this process's standard output."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        every = max(1, total // LINES)

        def print_line(report: Report) -> None:
            if not report.is_whole:
                return
            if report.completed % every == 0 or report.completed in (1, total):
                print(f"  {describe(report, unit=unit, total=total)}", flush=True)

        yield print_line
        return
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[losses]}"), console=console) as bar:
        task = bar.add_task(f"{unit}s", total=total, losses="")

        def update_bar(report: Report) -> None:
            bar.update(task, completed=report.completed, losses=_details(report))

        yield update_bar
