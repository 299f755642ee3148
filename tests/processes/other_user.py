"""Python programs that root starts as another user of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def start_as_nobody(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python program as the user `nobody`, with pipes. Skip the test if this user can run no Python."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no python3 that every user may run")
    return subprocess.Popen(
        [python, "-c", program, *arguments],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
