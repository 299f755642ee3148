"""Read and write protected Parquet files.

Protection is Parquet modular encryption (Apache Parquet format, `Encryption.md`) with a plaintext footer. Every tool
can read the public columns, and no tool can read the other columns without their key. Each page is authenticated
together with its position (file, row group, column, page). So a swap of pages within or between files is detected.
Arrow's key tools take no AAD prefix, so the footer identifies the whole file: it is signed, and contains the names of
the keys and, if a place was given, the file's place. A reader that passes the expected place detects an exchanged file.
Two limits remain: values of public columns have checksums but no authentication, and a process that can read a column
can also forge that column.

Keys are wrapped twice. So a process calls the key store once for each key and writer, not for each file and column. An
unwrapped key is cached for at most `CACHE_S` seconds, and a revoked key stops working within that time. When it reads,
Arrow 26 ignores its own `cache_lifetime` and would cache keys until the process ends. So this module clears the cache.

To read a file without its keys, use Polars or DuckDB, or select only public columns. Arrow refuses to read a protected
column. But access to that column's metadata ends the process, and a filter on that column never returns.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import os
import time
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe

from cluster.errors import AccessDenied, SchemaMismatch
from cluster.security.encryption.parquet.footer import PLACE, FileKeys, ProtectedFileCorrupt, read_footer
from cluster.security.encryption.parquet.protection import Protection
from cluster.security.keys.store import KeyNotFound, KeyRevoked, KeyStore, KeyStoreUnavailable
from cluster.storage import dictionary_columns, file_system, is_uri, write_bytes

CACHE_S = 60.0
WHOLE_FILE_BYTES = 64 * 2**20
"""A remote file of a known size up to this is read with one request."""
_KEY_DENIED = (AccessDenied, KeyRevoked, KeyNotFound)


class ProtectedFiles:
    """Reads and writes protected files with the keys of one store.

    Create one object in each process, because Arrow's factory cannot cross a process boundary.
    """

    def __init__(self, store: KeyStore, *, cache_s: float = CACHE_S) -> None:
        self._store = store
        self._factory = pe.CryptoFactory(lambda _: _Kms(store))
        self._connection = pe.KmsConnectionConfig()
        self._cache_s = cache_s
        self._cached_since = time.monotonic()

    def forget(self) -> None:
        """Clear the cache of unwrapped keys. Call this before a write that must use a new version of a key."""
        self._factory.remove_cache_entries_for_all_tokens()
        self._cached_since = time.monotonic()

    def write(
        self,
        table: pa.Table,
        uri: str,
        protection: Protection,
        *,
        place: str | None = None,
        row_group_rows: int | None = None,
    ) -> int:
        """Write a table as one file, completely or not at all, and return the file's size in bytes.

        Args:
            table: the table to write.
            uri: path or URL of the new file.
            protection: the columns' keys.
            place: where the file belongs, such as its path within the storage root. It is stored in the file, and a
                read that expects another place fails.
            row_group_rows: largest number of rows of a row group; Arrow's default is 2^20.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: errors of the key store.
            SchemaMismatch: the name of a protected column cannot be written.
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
            use_dictionary=dictionary_columns(table.schema),
            write_statistics=[
                name for name, key in protection.keys_of(table.column_names).items() if key is None
            ],
            write_page_checksum=True,
            encryption_properties=self._encryption(by_key, protection) if by_key else None,
        ) as writer:
            writer.write_table(table, row_group_size=row_group_rows)
        data = sink.getvalue()
        try:
            read_footer(pa.BufferReader(data)).check(protection, place)
        except ProtectedFileCorrupt as error:
            raise SchemaMismatch(
                f"{uri} was not written, because {error}: column names clash. Rename the columns."
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
        """Return the table in a file, or only some of its columns.

        Public columns can be read without a key. The footer's signature is then not checked.

        Args:
            uri: path or URL of the file.
            columns: names of the columns to read; all by default. Columns that the file lacks are left out.
            protection: expected keys. A file is refused if one of the columns to read has another key or no key.
            place: expected place. A file that was written for another place is refused. This needs `protection`.
            unplaced: also accept a file without a stored place, as earlier releases wrote them.

        Raises:
            AccessDenied, KeyRevoked, KeyNotFound: the store does not give a column's key. The other columns can still
                be read by name.
            ProtectedFileCorrupt: the file is truncated, altered, or not the expected one.
            OSError: an error of the file system.
        """
        with self.open(uri, protection=protection, place=place, unplaced=unplaced) as file:
            return file.read(columns)

    @contextlib.contextmanager
    def open(
        self,
        uri: str,
        *,
        protection: Protection | None = None,
        place: str | None = None,
        unplaced: bool = False,
        size_bytes: int | None = None,
    ) -> Iterator[ProtectedFile]:
        """Open a file, to read it in parts. For arguments and errors see `read`.

        Args:
            uri: path or URL of the file.
            protection: expected keys.
            place: expected place.
            unplaced: also accept a file without a stored place.
            size_bytes: size of the file, if it is known. A small remote file is then read with one request.
        """
        self._expire()
        try:
            with _open_source(uri, size_bytes) as source:
                properties = self._factory.file_decryption_properties(
                    self._connection, pe.DecryptionConfiguration(cache_lifetime=self._cache_s)
                )
                expected = None if protection is None else _Expected(protection, place, unplaced)
                yield ProtectedFile(source, properties, expected)
        except ProtectedFileCorrupt as error:
            raise ProtectedFileCorrupt(
                f"{uri} is not the expected file: {error}. Restore it from a backup. If the protection of the table "
                "was changed since, write the file again."
            ) from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ProtectedFileCorrupt(
                f"{uri} was truncated or altered, or is not a Parquet file: {str(error)[:200]}. "
                "Restore it from a backup."
            ) from error

    def keys(self, uri: str) -> FileKeys:
        """Return the keys that a file names. No key is needed, and nothing is verified.

        Raises:
            ProtectedFileCorrupt: the footer is missing or incomplete.
        """
        fs, path = file_system(uri)
        with fs.open(path, "rb") as source:
            return read_footer(source)

    def readable_columns(self, uri: str) -> list[str]:
        """Return the columns whose keys the store gives to this process.

        It requests each key once, and bypasses the cache.
        """
        keys = self.keys(uri)
        denied_keys = set()
        for key, wrapped in keys.wrapped.items():
            try:
                self._store.unwrap(key, wrapped)
            except _KEY_DENIED:
                denied_keys.add(key)
        return [name for name, key in keys.columns.items() if key not in denied_keys]

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
        """Encrypt a file again, with the newest key versions or with other keys. Return its new size in bytes.

        Old key versions still decrypt old files. So this is needed only if a key may have leaked or a column's class
        has changed. Arrow can rotate keys without a rewrite only if the keys are in separate files. But such files
        could be lost or exchanged without the data.

        Args:
            uri: the existing file.
            target: the new file. It has another name, so that the table's log can switch in one step.
            protection: the new keys of the columns.
            was: the expected keys of the existing file, if they are known.
            place: see `write`. With `was`, also the expected place of the existing file.
            unplaced: see `read`.
        """
        table = self.read(uri, protection=was, place=place, unplaced=unplaced)
        self.forget()
        return self.write(table, target, protection, place=place)

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


@contextlib.contextmanager
def _open_source(uri: str, size_bytes: int | None) -> Iterator[BinaryIO]:
    fs, path = file_system(uri)
    if not is_uri(uri):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        # Arrow reads a local file without Python's interpreter lock.
        with pa.OSFile(path) as file:
            yield file
    elif size_bytes is not None and size_bytes <= WHOLE_FILE_BYTES:
        # With an end, s3fs asks for no size first.
        with pa.BufferReader(fs.cat_file(path, start=0, end=size_bytes)) as file:
            yield file
    else:
        with fs.open(path, "rb") as file:
            yield file


class _Expected(NamedTuple):
    """What a file is compared with before its columns are read. For the fields see `ProtectedFiles.read`."""

    protection: Protection
    place: str | None
    unplaced: bool


class ProtectedFile:
    """An open file. `ProtectedFiles.open` creates it."""

    def __init__(
        self, source: BinaryIO, properties: pe.FileDecryptionProperties, expected: _Expected | None
    ) -> None:
        self._source, self._properties, self._expected = source, properties, expected
        self._keys = None if expected is None else read_footer(source)
        self._file: pq.ParquetFile | None = None

    @property
    def num_row_groups(self) -> int:
        """Number of row groups. No key is needed."""
        return int(self._open(None).num_row_groups)

    @property
    def row_group_sizes(self) -> list[int]:
        """Number of rows of each row group. No key is needed."""
        metadata = self._open(None).metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns, as `read` returns them. No key is needed."""
        schema = self._open(None).schema_arrow
        metadata = dict(schema.metadata or {})
        metadata.pop(PLACE, None)
        return schema.with_metadata(metadata or None)

    def read(self, columns: Sequence[str] | None = None, *, row_group: int | None = None) -> pa.Table:
        """Return some columns, by default all, of one row group or of all. For errors see `ProtectedFiles.read`."""
        if self._keys is not None and self._expected is not None:
            protection, place, unplaced = self._expected
            self._keys.check(protection, place, columns, unplaced=unplaced)
        try:
            if self._file is None:
                self._file = self._open(self._properties)
            return _read(self._file, columns, row_group)
        except _KEY_DENIED:
            keys = (self._keys or read_footer(self._source)).columns
            if any(keys[name] is not None for name in (keys if columns is None else columns) if name in keys):
                raise
            return _read(self._open(None), columns, row_group)

    def _open(self, properties: pe.FileDecryptionProperties | None) -> pq.ParquetFile:
        self._source.seek(0)
        return pq.ParquetFile(self._source, decryption_properties=properties, page_checksum_verification=True)


def _read(file: pq.ParquetFile, columns: Sequence[str] | None, row_group: int | None) -> pa.Table:
    present = file.schema_arrow.names
    names = present if columns is None else [name for name in columns if name in present]
    table = file.read(names) if row_group is None else file.read_row_group(row_group, names)
    metadata = dict(table.schema.metadata or {})
    metadata.pop(PLACE, None)
    return table.replace_schema_metadata(metadata or None)


class _Kms(pe.KmsClient):  # type: ignore[misc]
    """Adapter from Arrow to the key store.

    It converts OSError, because Arrow would report an OSError as an error of the file.
    """

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
    return KeyStoreUnavailable(f"The key store could not be reached for key '{name}'. Is its broker running?")
