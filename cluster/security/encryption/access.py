"""How a process reads and writes protected files with the keys that it may use."""

from __future__ import annotations

import functools

from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.access import KeyAccess, key_store


@functools.lru_cache(maxsize=16)
def protected_files(access: KeyAccess) -> ProtectedFiles:
    """Reader and writer of protected files; it keeps unwrapped keys for a minute."""
    return ProtectedFiles(key_store(access))
