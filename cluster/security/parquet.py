"""Protected Parquet: the one way to write and read tables with columns that need a key.

Parquet modular encryption (Apache Parquet format, `Encryption.md`) with a plaintext footer: every tool can read the
public columns, and nobody the others without their key. Each page is authenticated together with its
place (file, row group, column, page), so that nothing can be swapped within or between files unseen. What is left open:
public columns are not authenticated, only checksummed, and a whole file can be put in the place of another of the same
table; the table's log and manifest say which file belongs where.

Statistics of protected columns are not written: a plaintext footer would show them. Keys are wrapped twice, so that a
process asks the key store once for each key and not for each file; `CACHE_S` is how long it goes on reading after a key
was revoked.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
from fsspec.core import url_to_fs

from cluster.errors import RefusedError
from cluster.security.keys.store import KeyStore
from cluster.storage import write_bytes

CACHE_S = 60.0


class ProtectedFileCorrupt(RefusedError):
    """A file that was truncated or altered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protection:
    """Which key each column of a table is under, as plain data that any worker can be given."""

    default: str
    """Key of the footer's signature and of every column that is not named."""
    keys: tuple[tuple[str, str | None], ...] = ()
    """Column to its key; none for a public column, which needs no key."""

    def key_of(self, column: str) -> str | None:
        """The key of a column."""
        return dict(self.keys).get(column, self.default)


class ProtectedFiles:
    """Writes and reads protected files with the keys of one store; made once in a process, because Arrow's factory
    cannot cross its border."""

    def __init__(self, store: KeyStore, *, cache_s: float = CACHE_S) -> None:
        self._store = store
        self._factory = pe.CryptoFactory(lambda _: _Kms(store))
        self._connection = pe.KmsConnectionConfig()
        self._cache = dt.timedelta(seconds=cache_s)

    def write(self, table: pa.Table, uri: str, protection: Protection) -> int:
        """Write a table as one file, whole or not at all; gives its size in bytes.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
        """
        by_key: dict[str, list[str]] = {}
        public = []
        for column in table.column_names:
            key = protection.key_of(column)
            if key is None:
                public.append(column)
            else:
                by_key.setdefault(key, []).append(column)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(
            sink,
            table.schema,
            compression="zstd",
            write_statistics=public,
            write_page_checksum=True,
            encryption_properties=self._encryption(by_key, protection) if by_key else None,
        ) as writer:
            writer.write_table(table)
        data = sink.getvalue()
        write_bytes(uri, data)
        return int(data.size)

    def read(self, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one file, or those of some columns that it has.

        Raises:
            AccessDenied, KeyRevoked, KeyNotFound: for a column whose key the store does not give; the others can still
                be read by naming them.
            ProtectedFileCorrupt: truncated or altered.
        """
        fs, path = url_to_fs(uri)
        properties = self._factory.file_decryption_properties(
            self._connection, pe.DecryptionConfiguration(cache_lifetime=self._cache)
        )
        try:
            with fs.open(path, "rb") as source:
                file = pq.ParquetFile(
                    source, decryption_properties=properties, page_checksum_verification=True
                )
                known = file.schema_arrow.names
                wanted = known if columns is None else [name for name in columns if name in known]
                return file.read(wanted)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ProtectedFileCorrupt(
                f"{uri} was truncated or altered, or is no Parquet file: {str(error)[:200]}. Restore it from a backup."
            ) from error

    def _encryption(
        self, by_key: dict[str, list[str]], protection: Protection
    ) -> pe.FileEncryptionProperties:
        return self._factory.file_encryption_properties(
            self._connection,
            pe.EncryptionConfiguration(
                footer_key=protection.default,
                column_keys=by_key,
                plaintext_footer=True,
                double_wrapping=True,
                cache_lifetime=self._cache,
                data_key_length_bits=256,
            ),
        )


class _Kms(pe.KmsClient):  # type: ignore[misc]
    """Arrow's view of the key store."""

    def __init__(self, store: KeyStore) -> None:
        super().__init__()
        self._store = store

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        return self._store.wrap(master_key_identifier, key_bytes)

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        return self._store.unwrap(master_key_identifier, wrapped_key)
