"""Atomic file replacement without fsync, for files that can be rebuilt from the ledger.

An fsync takes half a second on a busy disk, and a rollback would wait for it. After a power failure, the controller
reads the ledger and writes the files again.
"""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file, so that readers see either the old or the new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
