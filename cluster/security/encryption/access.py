"""Access to protected files with the keys that a process may use."""

from __future__ import annotations

import functools

from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.access import KeyAccess, key_store


@functools.lru_cache(maxsize=16)
def protected_files(access: KeyAccess) -> ProtectedFiles:
    """Return the reader and writer of protected files. This object caches unwrapped keys for a minute."""
    return ProtectedFiles(key_store(access))
