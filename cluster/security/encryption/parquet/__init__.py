"""Protected Parquet: the one way to write and read tables with columns that need a key."""

from cluster.security.encryption.parquet.files import CACHE_S, ProtectedFiles
from cluster.security.encryption.parquet.footer import FileKeys, ProtectedFileCorrupt
from cluster.security.encryption.parquet.protection import Protection, public_statistics

__all__ = ["CACHE_S", "FileKeys", "ProtectedFileCorrupt", "ProtectedFiles", "Protection", "public_statistics"]
