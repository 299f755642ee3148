"""Decode the keys in a file's plaintext footer, without any key.

Arrow checks a footer's signature with the key that the file itself names, and also reads files without protection. So
this module compares the file's keys with the expected keys. Arrow's Python API does not return the file's keys, and
ends the process on access to a protected column's metadata without its key. So this module decodes the footer itself,
from Thrift's compact protocol, with the field numbers of Parquet's `parquet.thrift`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from cluster.errors import RefusedError
from cluster.security.encryption.parquet.protection import Protection

PLACE = b"falaj.place"
MAX_FOOTER_BYTES = 64 * 2**20
MAX_DEPTH = 16
MAGIC = b"PAR1"
_TAIL_BYTES = 8
_CACHED_BYTES = 8 * 2**20
"""A decoded footer up to this size is kept until two other files were opened."""
# parquet.thrift: FileMetaData, RowGroup, ColumnChunk, ColumnCryptoMetaData, ColumnMetaData, KeyValue
_ROW_GROUPS, _KEY_VALUES, _SIGNING_KEY = 4, 5, 9
_COLUMNS = 1
_META, _CRYPTO = 3, 8
_WITH_FOOTER_KEY, _WITH_COLUMN_KEY = 1, 2
_CRYPTO_PATH, _CRYPTO_KEY = 1, 2
_META_PATH, _META_STATISTICS = 3, 12
_KEY, _VALUE = 1, 2


class ProtectedFileCorrupt(RefusedError):
    """A protected file is truncated, altered or exchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileKeys:
    """The keys that a file names."""

    signed_by: str | None
    """Key of the footer's signature; None in an ordinary file."""
    columns: dict[str, str | None]
    """Maps column to its key; None for a column that is not encrypted."""
    wrapped: dict[str, str]
    """Maps key to the wrapped secret that decrypts the key's columns: `<scheme>:v<version>:<base64>`."""
    place: str | None
    """Place that is stored in the file; None if no place is stored."""

    def check(
        self,
        protection: Protection,
        place: str | None,
        columns: Sequence[str] | None = None,
        *,
        unplaced: bool = False,
    ) -> None:
        """Require that the keys and the place of the file are the expected ones.

        Args:
            protection: the expected keys.
            place: the expected place; None accepts every place.
            columns: the columns to check; None checks all. A reader of an older table version does not know the columns
                that were added later.
            unplaced: also accept a file without a stored place.

        Raises:
            ProtectedFileCorrupt: the message names the difference.
        """
        if self.signed_by != protection.default and not (
            self.signed_by is None and protection.may_be_plain(self.columns)
        ):
            under = "no key" if self.signed_by is None else f"key '{self.signed_by}'"
            raise ProtectedFileCorrupt(f"its footer is signed by {under}, not by '{protection.default}'")
        counted = self.columns.keys() if columns is None else set(columns)
        read = [name for name in self.columns if name in counted]
        for name, wanted in protection.keys_of(read).items():
            if self.columns[name] != wanted:
                raise ProtectedFileCorrupt(
                    f"column '{name}' is {_describe_key(self.columns[name])}, and should be {_describe_key(wanted)}"
                )
        at_home = self.place == place or (unplaced and self.place is None)
        if place is not None and self.signed_by is not None and not at_home:
            raise ProtectedFileCorrupt(f"it belongs at {self.place!r}, not at {place!r}")


def read_footer(source: BinaryIO) -> FileKeys:
    """Decode the footer of an open file. This moves the file's position.

    Raises:
        ProtectedFileCorrupt: the footer is missing, incomplete or invalid.
    """
    size = source.seek(0, os.SEEK_END)
    source.seek(max(size - _TAIL_BYTES, 0))
    tail = source.read(_TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or not 0 < length <= min(size - _TAIL_BYTES - len(MAGIC), MAX_FOOTER_BYTES):
        raise ProtectedFileCorrupt("it has no whole footer")
    source.seek(size - _TAIL_BYTES - length)
    footer = source.read(length)
    try:
        return _decode(footer) if length <= _CACHED_BYTES else _file_keys(_Compact(footer).struct())
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ProtectedFileCorrupt("its footer cannot be decoded") from error


@functools.lru_cache(maxsize=2)
def _decode(footer: bytes) -> FileKeys:
    """Return the keys that a footer names.

    A file that is read row group by row group is opened for each group, and a footer grows with the number of groups.
    """
    return _file_keys(_Compact(footer).struct())


def _file_keys(file: dict[int, Any]) -> FileKeys:
    wrapped: dict[str, str] = {}
    signed_by = _parse_key_material(file[_SIGNING_KEY], wrapped) if _SIGNING_KEY in file else None
    columns: dict[str, str | None] = {}
    for chunk in (chunk for group in file[_ROW_GROUPS] for chunk in group[_COLUMNS]):
        name, key = _column(chunk, wrapped, signed_by)
        if columns.setdefault(name, key) != key:
            raise ValueError(f"column '{name}' is under several keys")
    pairs = [(pair[_KEY], pair.get(_VALUE)) for pair in file.get(_KEY_VALUES, [])]
    places = [value.decode() for key, value in pairs if key == PLACE]
    if len(places) > 1:
        raise ValueError("more than one place")
    return FileKeys(
        signed_by=signed_by, columns=columns, wrapped=wrapped, place=places[0] if places else None
    )


def _column(chunk: dict[int, Any], wrapped: dict[str, str], signed_by: str | None) -> tuple[str, str | None]:
    if _CRYPTO not in chunk:
        return chunk[_META][_META_PATH][0].decode(), None
    if _META_STATISTICS in chunk.get(_META, {}):
        raise ValueError("statistics of a protected column in the clear")
    crypto = chunk[_CRYPTO]
    if _WITH_FOOTER_KEY in crypto:
        return chunk[_META][_META_PATH][0].decode(), signed_by
    with_key = crypto[_WITH_COLUMN_KEY]
    return with_key[_CRYPTO_PATH][0].decode(), _parse_key_material(with_key[_CRYPTO_KEY], wrapped)


def _parse_key_material(material: bytes, wrapped: dict[str, str]) -> str:
    """Return the name of the key in Parquet's key material, and add the key's wrapped secret to `wrapped`."""
    parsed = json.loads(material, object_pairs_hook=_unique_names)
    name, secret = parsed["masterKeyID"], parsed["wrappedKEK" if parsed["doubleWrapping"] else "wrappedDEK"]
    if not isinstance(name, str) or not isinstance(secret, str):
        raise TypeError("invalid key material")
    wrapped.setdefault(name, secret)
    return name


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        raise ValueError("duplicate name")
    return parsed


def _describe_key(key: str | None) -> str:
    return "in the clear" if key is None else f"under key '{key}'"


class _Compact:
    """Decodes Thrift's compact protocol into numbers, bytes, lists, and dicts by field number."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            if number in fields:
                raise ValueError("duplicate field")
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        match kind:
            case 1 | 2 | 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._zigzag()
            case 7:
                return self._take(8)
            case 8:
                return self._take(self._varint())
            case 9 | 10:
                return list(self._items(depth))
            case 12:
                return self.struct(depth)
            case _:
                raise ValueError("unknown Thrift type")

    def _items(self, depth: int) -> Iterator[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        for _ in range(count):
            yield self._value(head & 15, depth + 1)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise IndexError("cut off")
        self._at += count
        return self._data[self._at - count : self._at]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("unterminated number")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
