"""On a machine with a GPU, the measurement ends in time and measures everything that its packages allow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("run.py")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch finds none")


def test_a_gpu_is_measured() -> None:
    """Each step has a peak of memory and a utilisation. Checkpointing and offload need less memory than neither."""
    process = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, timeout=480, check=True
    )
    print(process.stdout)
    result = json.loads(process.stdout.splitlines()[-1])
    peaks = {step["case"]: step["peak_gib"] for step in result["steps"]}
    assert peaks["activation checkpointing"] < peaks["plain"]
    assert peaks["offload"] < peaks["plain"]
    assert all(0 < step["utilisation"] < 1 for step in result["steps"])
