"""What must outlive a power cut: the names in a folder, and what others wrote to a file."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Have what others wrote to a file on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
