"""Protected Parquet: read and write tables whose columns are encrypted under different keys."""

from cluster.security.encryption.parquet.files import CACHE_S, WHOLE_FILE_BYTES, ProtectedFile, ProtectedFiles
from cluster.security.encryption.parquet.footer import FileKeys, ProtectedFileCorrupt
from cluster.security.encryption.parquet.protection import Protection, public_statistics

__all__ = [
    "CACHE_S",
    "WHOLE_FILE_BYTES",
    "FileKeys",
    "ProtectedFile",
    "ProtectedFileCorrupt",
    "ProtectedFiles",
    "Protection",
    "public_statistics",
]
