"""The measurement of a GPU, on a CPU: it works, and says that it measured no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "gpu" / "run.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; tests/gpu measures it")
def test_the_script_runs_on_a_cpu_and_says_so() -> None:
    """`--tiny` makes a step of each case. Without it, the script measures nothing and exits with 2."""
    tiny = subprocess.run([sys.executable, SCRIPT, "--tiny"], capture_output=True, text=True, check=True)
    *_, figures, last = tiny.stdout.splitlines()
    assert last.startswith("NOTHING WAS MEASURED ON A GPU")
    result = json.loads(figures)
    assert result["device"] == "cpu"
    assert [step["case"] for step in result["steps"]] == [
        "plain", "autocast", "activation checkpointing", "offload", "offload + activation checkpointing",
    ]  # fmt: skip
    assert len({round(step["loss"], 4) for step in result["steps"]}) == 1, result
    assert any("no CUDAExecutionProvider" in reason for reason in result["not_measured"])
    whole = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert whole.returncode == 2
    assert "nothing is measured" in whole.stdout
