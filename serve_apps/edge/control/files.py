"""Files of the edge that follow from the ledger: whole or not at all, and without waiting for the disk.

An fsync takes half a second on a busy disk, in which a rollback would wait. After a power failure the ledger is read
again, and the files with it.
"""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in the place of an older one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
