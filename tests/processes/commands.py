"""Run commands: as a new process, or their `main` in this process.

Starting Python for each call would take most of a test's time. So only tests of process start use a new process.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

COMMAND_TIMEOUT_S = 300.0


def run_main(main: Callable[[], None], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command's `main` with these arguments, and return its output and exit code."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["command", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())


def run_process(
    command: list[str], *, env: dict[str, str], cwd: Path | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command line as a new process. With `check`, a failure fails the test and shows the output."""
    result = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S
    )
    return checked(result) if check else result


def checked(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Return the result of a command. If the command failed, fail the test and show its output."""
    if result.returncode:
        pytest.fail(
            f"{result.args} exited {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
        )
    return result
