"""Run a command's `main` in this process. Starting Python for each call would take most of a test's time."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from unittest.mock import patch


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
