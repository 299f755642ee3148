"""How far a fit is: workers say it, and the driver shows it.

Reports go through a Ray queue, because the fit runs in other processes. On a terminal a bar shows the latest; in a log
each report is a line, of a long run about twenty.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.util.queue import Empty, Queue
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINES = 20
"""Of a run in a log, at most about."""
_POLL_S, _LAST_S = 0.2, 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The state of a fit."""

    done: int
    """Epochs or rounds."""
    figures: dict[str, float]
    """Losses by name."""


Show = Callable[[Report], None]


@contextlib.contextmanager
def shown(*, unit: str, total: int) -> Iterator[Queue]:
    """Show what is put into the queue until the block ends.

    Args:
        unit: what is counted, `epoch`.
        total: how many there are at most.
    """
    queue = Queue(actor_options={"num_cpus": 0})
    done = threading.Event()

    def follow(show: Show) -> None:
        while True:
            ended = done.is_set()
            try:
                while True:
                    show(queue.get(timeout=_POLL_S))
            except Empty:
                if ended:
                    return
            except RayError:
                return  # the queue's process died; the fit does not depend on it

    with _display(unit, total) as show:
        thread = threading.Thread(target=follow, args=(show,), daemon=True)
        thread.start()
        try:
            yield queue
        finally:
            done.set()
            thread.join(_LAST_S)
            queue.shutdown(force=True)  # ends the thread, too, where the queue's process never started


def send(reports: Queue, report: Report) -> None:
    """Put a report into the queue without waiting for its actor, which may still be starting."""
    actor: Any = reports.actor
    actor.put.remote(report)


def diverged(what: str, value: float, when: str) -> str:
    """The message of a fit whose loss is no number."""
    return (
        f"The {what} is {value} in {when}: the fit diverged. Lower model.learning_rate, or look for extreme values in "
        "the inputs and the label."
    )


def describe(report: Report, *, unit: str, total: int) -> str:
    """A report as one line."""
    figures = ", ".join(f"{name} {value:.4f}" for name, value in report.figures.items())
    return f"{unit} {report.done} of {total}: {figures}"


@contextlib.contextmanager
def _display(unit: str, total: int) -> Iterator[Show]:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        every = max(1, total // LINES)
        yield (
            lambda report: (
                print(f"  {describe(report, unit=unit, total=total)}", flush=True)
                if report.done % every == 0 or report.done in (1, total)
                else None
            )
        )
        return
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console) as bar:
        task = bar.add_task(f"{unit}s", total=total, figures="")

        def show(report: Report) -> None:
            figures = describe(report, unit=unit, total=total).partition(": ")[2]
            bar.update(task, completed=report.done, figures=figures)

        yield show
