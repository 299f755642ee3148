"""Check that a store does not let two writers create the same file."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import fsspec

from cluster.errors import ConfigError
from cluster.storage import OBJECT_STORES, created, file_system

WRITE_CHECKS = 4


def require_exclusive_writes(root: str) -> None:
    """Check that if two writers create the same file at the same time, one of them fails. Delta's commits need this.

    Raises:
        ConfigError: Both writers succeeded, or the store cannot be reached.
    """
    if urlsplit(root).scheme not in OBJECT_STORES:
        return
    fs, path = file_system(f"{root}/.falaj-write-check/{uuid.uuid4().hex}")
    try:
        num_created = max(_race(fs, f"{path}-{attempt}") for attempt in range(WRITE_CHECKS))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"storage.root {root} cannot be used: {error}. Check bucket and credentials."
        ) from error
    if num_created > 1:
        raise ConfigError(
            f"storage.root {root}: the store let two writers create the same file (it ignores If-None-Match), so "
            "commits could be lost. Use a store that supports conditional writes."
        )


def _race(fs: fsspec.AbstractFileSystem, path: str) -> int:
    """Create a file from two threads, and return how many threads succeeded."""
    with ThreadPoolExecutor(2) as writers:
        num_created = sum(writers.map(lambda data: created(fs, path, data), (b"a", b"b")))
    fs.rm_file(path)
    return num_created
