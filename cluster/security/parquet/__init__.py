"""Protected Parquet: the one way to write and read tables with columns that need a key."""

from cluster.security.parquet.files import CACHE_S, ProtectedFiles
from cluster.security.parquet.footer import FileKeys, ProtectedFileCorrupt
from cluster.security.parquet.protection import Protection, public_statistics

__all__ = ["CACHE_S", "FileKeys", "ProtectedFileCorrupt", "ProtectedFiles", "Protection", "public_statistics"]
