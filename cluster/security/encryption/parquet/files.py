"""Writing and reading protected files.

Parquet modular encryption (Apache Parquet format, `Encryption.md`) with a plaintext footer: every tool can read the
public columns, and nobody the others without their key. Each page is authenticated together with its
place (file, row group, column, page), so that nothing can be swapped within or between files unseen. Arrow's key tools
take no AAD prefix, so what the file as a whole is, is bound through the footer: it is signed, and names the keys and,
where a place was given, the place. A reader that says what it expects is safe from an exchanged file. What is left
open: values of public columns are checksummed, not authenticated; and who can read a column can also forge it.

Keys are wrapped twice, so that a process asks the key store once for each key and writer, and not for each file and
column. A key is kept for `CACHE_S` seconds at most: after a revocation, reading and writing end within that time.
Arrow (26) does not keep to its own `cache_lifetime` when it reads: a process would keep keys as long as it lives.

Without its keys, read a file with Polars or DuckDB, or name public columns: Arrow refuses a protected column,
but ends the process when asked for such a column's metadata, and hangs when it filters by one.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
from fsspec.core import url_to_fs

from cluster.errors import AccessDenied, SchemaMismatch
from cluster.security.encryption.parquet.footer import PLACE, FileKeys, ProtectedFileCorrupt, read_footer
from cluster.security.encryption.parquet.protection import Protection
from cluster.security.keys.store import KeyNotFound, KeyRevoked, KeyStore, KeyStoreUnavailable
from cluster.storage import coded_columns, write_bytes

CACHE_S = 60.0
_CLOSED = (AccessDenied, KeyRevoked, KeyNotFound)


class ProtectedFiles:
    """Writes and reads protected files with the keys of one store; made once in a process, because Arrow's factory
    cannot cross its border."""

    def __init__(self, store: KeyStore, *, cache_s: float = CACHE_S) -> None:
        self._store = store
        self._factory = pe.CryptoFactory(lambda _: _Kms(store))
        self._connection = pe.KmsConnectionConfig()
        self._cache_s = cache_s
        self._cached_since = time.monotonic()

    def forget(self) -> None:
        """Ask the key store anew from now on; needed to write under a version that was just made."""
        self._factory.remove_cache_entries_for_all_tokens()
        self._cached_since = time.monotonic()

    def write(self, table: pa.Table, uri: str, protection: Protection, *, place: str | None = None) -> int:
        """Write a table as one file, whole or not at all; gives its size in bytes.

        Args:
            table: what to write.
            uri: where to.
            protection: the columns' keys.
            place: what the file says of where it belongs, its path within the storage root, say; whoever reads it
                with another place is refused.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
            SchemaMismatch: a protected column's name cannot be written.
        """
        self._expire()
        by_key = protection.by_key(table.column_names)
        if place is not None:
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), PLACE: place.encode()})
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(
            sink,
            table.schema,
            compression="zstd",
            use_dictionary=coded_columns(table.schema),
            write_statistics=[
                name for name, key in protection.keys_of(table.column_names).items() if key is None
            ],
            write_page_checksum=True,
            encryption_properties=self._encryption(by_key, protection) if by_key else None,
        ) as writer:
            writer.write_table(table)
        data = sink.getvalue()
        try:
            read_footer(pa.BufferReader(data)).check(protection, place)
        except ProtectedFileCorrupt as error:
            raise SchemaMismatch(
                f"{uri} was not written, because {error}: names of columns clash. Rename them."
            ) from error
        write_bytes(uri, data)
        return int(data.size)

    def read(
        self,
        uri: str,
        columns: Sequence[str] | None = None,
        *,
        protection: Protection | None = None,
        place: str | None = None,
        unplaced: bool = False,
    ) -> pa.Table:
        """Read one file, or those of some columns that it has.

        Public columns can be read without any key, then without the footer's signature being checked.

        Args:
            uri: the file.
            columns: names; all of them unless given.
            protection: refuse a file whose columns, those that are read, are under other keys than these, or in the
                clear.
            place: refuse a file that was written for another place; needs `protection`.
            unplaced: take a file that says nothing of its place, too, where earlier releases wrote such.

        Raises:
            AccessDenied, KeyRevoked, KeyNotFound: for a column whose key the store does not give; the others can still
                be read by naming them.
            ProtectedFileCorrupt: truncated, altered, or not what it should be.
            OSError: the file system's own errors.
        """
        self._expire()
        fs, path = url_to_fs(uri)
        try:
            with fs.open(path, "rb") as source:
                if protection is not None:
                    read_footer(source).check(protection, place, columns, unplaced=unplaced)
                return self._read(source, columns)
        except ProtectedFileCorrupt as error:
            raise ProtectedFileCorrupt(
                f"{uri} is not the file it should be: {error}. Restore it from a backup; if the table's protection was "
                "changed since, write it anew."
            ) from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ProtectedFileCorrupt(
                f"{uri} was truncated or altered, or is no Parquet file: {str(error)[:200]}. Restore it from a backup."
            ) from error

    def keys(self, uri: str) -> FileKeys:
        """What a file says of its keys; needs none, and checks nothing.

        Raises:
            ProtectedFileCorrupt: there is no whole footer.
        """
        fs, path = url_to_fs(uri)
        with fs.open(path, "rb") as source:
            return read_footer(source)

    def readable_columns(self, uri: str) -> list[str]:
        """The columns that the store gives the keys of; asks for each key once, past the cache."""
        keys = self.keys(uri)
        closed = set()
        for key, wrapped in keys.wrapped.items():
            try:
                self._store.unwrap(key, wrapped)
            except _CLOSED:
                closed.add(key)
        return [name for name, key in keys.columns.items() if key not in closed]

    def reprotect(
        self,
        uri: str,
        target: str,
        protection: Protection,
        *,
        was: Protection | None = None,
        place: str | None = None,
        unplaced: bool = False,
    ) -> int:
        """Rewrite a file under the newest versions of keys, or under other keys; gives the new size in bytes.

        Old versions keep reading old files, so this is for after a key may have leaked, or a column changed its class.
        Arrow can rotate without rewriting only where keys lie in files of their own beside the data, which then can be
        lost or exchanged apart from it.

        Args:
            uri: the file as it is.
            target: where to write; another name, so that the table's log can change over in one step.
            protection: the columns' keys from now on.
            was: what the file should be under now, if that is known.
            place: as of `write`; with `was` it is also where the file should belong now.
            unplaced: as of `read`.
        """
        table = self.read(uri, protection=was, place=place, unplaced=unplaced)
        self.forget()
        return self.write(table, target, protection, place=place)

    def _read(self, source: BinaryIO, columns: Sequence[str] | None) -> pa.Table:
        properties = self._factory.file_decryption_properties(
            self._connection, pe.DecryptionConfiguration(cache_lifetime=self._cache_s)
        )
        try:
            return _open(source, columns, properties)
        except _CLOSED:
            keys = read_footer(source).columns
            if any(keys[name] is not None for name in (keys if columns is None else columns) if name in keys):
                raise
            return _open(source, columns, None)

    def _expire(self) -> None:
        if time.monotonic() - self._cached_since >= self._cache_s:
            self.forget()

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
                cache_lifetime=dt.timedelta(seconds=self._cache_s),
                data_key_length_bits=256,
            ),
        )


def _open(
    source: BinaryIO, columns: Sequence[str] | None, properties: pe.FileDecryptionProperties | None
) -> pa.Table:
    source.seek(0)
    file = pq.ParquetFile(source, decryption_properties=properties, page_checksum_verification=True)
    known = file.schema_arrow.names
    table = file.read(known if columns is None else [name for name in columns if name in known])
    metadata = dict(table.schema.metadata or {})
    metadata.pop(PLACE, None)
    return table.replace_schema_metadata(metadata or None)


class _Kms(pe.KmsClient):  # type: ignore[misc]
    """Arrow's view of the key store. An OSError would be taken for the file's own."""

    def __init__(self, store: KeyStore) -> None:
        super().__init__()
        self._store = store

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        try:
            return self._store.wrap(master_key_identifier, key_bytes)
        except OSError as error:
            raise _unavailable(master_key_identifier) from error

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        try:
            return self._store.unwrap(master_key_identifier, wrapped_key)
        except OSError as error:
            raise _unavailable(master_key_identifier) from error


def _unavailable(name: str) -> KeyStoreUnavailable:
    return KeyStoreUnavailable(f"The key store could not be asked for key '{name}'. Is its broker running?")
