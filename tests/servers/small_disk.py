"""A small file system of its own, to test a full disk."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted_small_disk(folder: Path, *, size_mib: int = 8) -> Iterator[Path]:
    """Mount a small file system at a new folder. The test is skipped if the machine cannot mount one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size_mib}m,mode=700"]
    mounted = subprocess.run(["mount", *options, "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of its own needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill_disk(path: Path) -> None:
    """Fill a file system completely."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
