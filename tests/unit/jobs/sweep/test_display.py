"""What a sweep shows: lines in a log, a table on a terminal, and the page of its report."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jobs.sweep.display import Display, table
from jobs.sweep.history import Status, Trial
from jobs.sweep.page import render

TRIALS = [
    Trial(number=1, parameters={"rate": 0.012345}, status=Status.finished, losses={1: 0.5, 2: 0.4, 3: 0.45}),
    Trial(number=2, parameters={"rate": 0.5}, status=Status.stopped, losses={1: 0.9}),
    Trial(number=3, parameters={"rate": "<b>"}, status=Status.failed, reason="OSError", cause="disk full"),
]


def test_a_log_has_one_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    """Start, reports and end."""
    trial = Trial(number=1, parameters={"rate": 0.012345, "width": 8})
    with Display(num_trials=4, console=Console(file=io.StringIO())) as display:
        display.show(trial)
        trial.losses[1] = 0.5
        display.show(trial)
        trial.status = Status.finished
        display.show(trial)
        display.show(TRIALS[2])
    assert capsys.readouterr().out.splitlines() == [
        "  trial 1 of 4: rate=0.0123 width=8: starts",
        "  trial 1 of 4: rate=0.0123 width=8: report 1, validation_loss 0.5000",
        "  trial 1 of 4: rate=0.0123 width=8: finished, validation_loss 0.5000",
        "  trial 3 of 4: rate=<b>: failed: disk full",
    ]


def test_a_terminal_has_a_table_of_all_trials() -> None:
    """It is updated in place."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with Display(num_trials=3, console=console) as display:
        for trial in TRIALS:
            display.show(trial)
    shown = Console(file=io.StringIO(), width=100)
    with shown.capture() as capture:
        shown.print(table(TRIALS))
    lines = capture.get().splitlines()
    assert len(lines) == 4
    assert "stopped" in lines[2]
    assert "0.4000" in text.getvalue()


def test_the_page_has_each_trial_and_its_losses() -> None:
    """The texts are escaped, and the best trial is named."""
    page = render(TRIALS, model="m", run="s", settings={"sweep.trials": 3})
    assert "The best of 3 trials is trial 1" in page
    assert page.count("<tr>") == 4
    assert "rate=&lt;b&gt;" in page
    assert "<b>" not in page
    assert "validation_loss by rung" in page
    assert "sweep.trials" in page


def test_the_page_of_a_sweep_with_one_report_has_no_lines() -> None:
    """There is nothing to connect."""
    page = render(TRIALS[1:2], model="m", run="s", settings={})
    assert "polyline" not in page
