"""The line that a run prints for a stage's result."""

from __future__ import annotations

import pytest

from jobs.pipeline.stage.summary import summarize
from tests.unit.jobs.pipeline.conftest import World, branches


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (
            {"rows_in": 4000, "rows_stored": 3990, "rows_quarantined": 10},
            "rows_in 4,000, rows_stored 3,990, rows_quarantined 10",
        ),
        (
            {"name": "m", "version": 2, "metrics.log_loss": 0.5, "metrics.auc": 0.91234},
            "version 2, auc 0.9123, log_loss 0.5",
        ),
        ({"slices.a.auc": 0.7, "slices.b.auc": 0.8}, ""),
        ({"metrics.auc": 0.75, "slices.a.auc": 0.7, "slices.b.auc": 0.8}, "auc 0.75"),
        ({"row_hash": "ab", "rows": 5, "hidden_share.view": 0.1}, "rows 5"),
        ({"ok": True}, ""),
        ({"summary": "serving m\nversion 2", "version": 2}, "serving m version 2"),
    ],
)
def test_the_figures_of_a_result_are_one_line(result: dict[str, object], line: str) -> None:
    """A figure that the result has for each slice, a hash and a truth value are not shown."""
    assert summarize(result) == line


def test_a_run_prints_the_figures_of_its_stages(world: World) -> None:
    """The reader sees them without opening a file."""
    world.run(branches()).execute(max_parallel=2)
    ends = [line for line in world.printed if " s · " in line]
    assert len(ends) == 4
    assert all("auc 0.9, total " in line for line in ends)
