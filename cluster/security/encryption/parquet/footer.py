"""What a file's plaintext footer says of its keys, read without any key.

Arrow checks a footer's signature, but with whatever key the file itself names, and reads a file without any protection
just as gladly. So what a file says is held against what it should be. Arrow's Python does not show it, and ends
the process when a protected column's metadata is touched without its key; therefore the footer is decoded here:
Thrift's compact protocol, and field numbers of Parquet's `parquet.thrift`.
"""

from __future__ import annotations

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
# parquet.thrift: FileMetaData, RowGroup, ColumnChunk, ColumnCryptoMetaData, ColumnMetaData, KeyValue
_ROW_GROUPS, _KEY_VALUES, _SIGNING_KEY = 4, 5, 9
_COLUMNS = 1
_META, _CRYPTO = 3, 8
_WITH_FOOTER_KEY, _WITH_COLUMN_KEY = 1, 2
_CRYPTO_PATH, _CRYPTO_KEY = 1, 2
_META_PATH, _META_STATISTICS = 3, 12
_KEY, _VALUE = 1, 2


class ProtectedFileCorrupt(RefusedError):
    """A file that was truncated, altered or exchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileKeys:
    """The keys that a file says it is under."""

    signed_by: str | None
    """Key of the footer's signature; none in an ordinary file."""
    columns: dict[str, str | None]
    """Column to its key; none for one in the clear."""
    wrapped: dict[str, str]
    """Key to the wrapped secret that opens what is under it: `<scheme>:v<version>:<base64>`."""
    place: str | None
    """Where the file says it belongs."""

    def check(
        self,
        protection: Protection,
        place: str | None,
        columns: Sequence[str] | None = None,
        *,
        unplaced: bool = False,
    ) -> None:
        """Hold it against what the file should be.

        Args:
            protection: the keys it should be under.
            place: where it should belong; none takes any.
            columns: those that count; none counts all. A reader of an older version of a table knows nothing of columns
                that were added since.
            unplaced: take a file that says nothing of its place, too.

        Raises:
            ProtectedFileCorrupt: saying what differs.
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
                    f"column '{name}' is {_under(self.columns[name])}, and should be {_under(wanted)}"
                )
        at_home = self.place == place or (unplaced and self.place is None)
        if place is not None and self.signed_by is not None and not at_home:
            raise ProtectedFileCorrupt(f"it belongs at {self.place!r}, not at {place!r}")


def read_footer(source: BinaryIO) -> FileKeys:
    """Decode the footer of an open file; its position moves.

    Raises:
        ProtectedFileCorrupt: there is no whole footer.
    """
    size = source.seek(0, os.SEEK_END)
    source.seek(max(size - _TAIL_BYTES, 0))
    tail = source.read(_TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or not 0 < length <= min(size - _TAIL_BYTES - len(MAGIC), MAX_FOOTER_BYTES):
        raise ProtectedFileCorrupt("it has no whole footer")
    source.seek(size - _TAIL_BYTES - length)
    try:
        return _file_keys(_Compact(source.read(length)).struct())
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ProtectedFileCorrupt("its footer cannot be decoded") from error


def _file_keys(file: dict[int, Any]) -> FileKeys:
    wrapped: dict[str, str] = {}
    signed_by = _unpack(file[_SIGNING_KEY], wrapped) if _SIGNING_KEY in file else None
    columns: dict[str, str | None] = {}
    for chunk in (chunk for group in file[_ROW_GROUPS] for chunk in group[_COLUMNS]):
        name, key = _column(chunk, wrapped, signed_by)
        if columns.setdefault(name, key) != key:
            raise ValueError(f"column '{name}' is under several keys")
    pairs = [(pair[_KEY], pair.get(_VALUE)) for pair in file.get(_KEY_VALUES, [])]
    places = [value.decode() for key, value in pairs if key == PLACE]
    if len(places) > 1:
        raise ValueError("several places")
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
    return with_key[_CRYPTO_PATH][0].decode(), _unpack(with_key[_CRYPTO_KEY], wrapped)


def _unpack(material: bytes, wrapped: dict[str, str]) -> str:
    """The key's name in Parquet's key material, whose wrapped secret is added."""
    found = json.loads(material, object_pairs_hook=_once)
    name, text = found["masterKeyID"], found["wrappedKEK" if found["doubleWrapping"] else "wrappedDEK"]
    if not isinstance(name, str) or not isinstance(text, str):
        raise TypeError("key material of another form")
    wrapped.setdefault(name, text)
    return name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _under(key: str | None) -> str:
    return "in the clear" if key is None else f"under key '{key}'"


class _Compact:
    """Thrift's compact protocol, decoded to numbers, bytes, lists and dicts by field number."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            if number in fields:
                raise ValueError("a field twice")
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
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
                raise ValueError("a type that a footer does not have")

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
        raise ValueError("a number without end")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
