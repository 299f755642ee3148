"""The order in which a version of a view packs its online values, and how another version reads them."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgpack
import numpy as np

from feature_jobs.store.types.dtypes import list_of, packed_element

_CODES = {
    "float64": "d",
    "float32": "f",
    "int64": "q",
    "int32": "i",
    "bool": "?",
    "timestamp": "q",
    "date": "i",
}
Lists: TypeAlias = tuple[tuple[int, np.dtype[Any]], ...]
"""The places of a part's lists of numbers, which are packed as bytes, and what their elements are."""


class Layout:
    """The order in which one version of a view packs its values: class by class, each class by type.

    A class whose fields are all of fixed width is packed as such, unless a row is loose; the others are msgpack. A
    list of numbers is its elements one behind the other, little-endian; with a declared length it is of fixed width.
    """

    def __init__(self, version: str, fields: Iterable[Sequence[str]]) -> None:
        """From the version and its fields' name, dtype and class."""
        self.version = version
        self.fields = tuple((name, dtype, sensitivity) for name, dtype, sensitivity in fields)
        places: dict[str, list[int]] = {}
        for place, (_, _, sensitivity) in enumerate(self.fields):
            places.setdefault(sensitivity, []).append(place)
        self.classes = tuple(places)
        self.places = tuple(places.values())
        self.structs = tuple(
            _struct([self.fields[place][1] for place in of_class]) for of_class in self.places
        )
        self.lists = tuple(_lists([self.fields[place][1] for place in of_class]) for of_class in self.places)
        declared = [list_of(dtype) for _, dtype, _ in self.fields]
        self.lengths = [(place, one.length) for place, one in enumerate(declared) if one and one.length]

    def is_loose(self, values: Sequence[Any]) -> bool:
        """Whether a row is packed without fixed widths: it has a null, or a list that is not of the declared length,
        which a row has that was stored under an earlier definition."""
        if not any(self.lists):
            return None in values
        if any(value is None for value in values):  # an array would be compared value by value
            return True
        return any(len(values[place]) != length for place, length in self.lengths)

    def groups(self, values: Sequence[Any], *, loose: bool) -> list[bytes]:
        """A row's values as bytes, by class."""
        groups = []
        for places, fixed, lists in zip(self.places, self.structs, self.lists, strict=True):
            group = [values[place] for place in places]
            for place, element in lists:
                if group[place] is not None:
                    group[place] = np.asarray(group[place], element).tobytes()
            packed = msgpack.packb(group) if fixed is None or loose else fixed.pack(*group)
            groups.append(packed)
        return groups

    def plan(self, wanted: Iterable[Sequence[str]]) -> Plan:
        """How rows of this layout are read as another version of the view wants them: features by name and dtype."""
        known = {
            (name, dtype): (number, position)
            for number, places in enumerate(self.places)
            for position, (name, dtype, _) in enumerate(self.fields[place] for place in places)
        }
        order = [known.get((name, dtype)) for name, dtype, *_ in wanted]
        parts = sorted({place[0] for place in order if place is not None})
        as_it_lies = [(0, position) for position in range(len(self.fields))]
        return Plan(
            parts=tuple(
                (number, self.classes[number], self.structs[number], self.lists[number]) for number in parts
            ),
            single=len(self.classes) == 1,
            order=None if len(self.classes) == 1 and order == as_it_lies else tuple(order),
            complete=None not in order,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Which parts of a row are opened, and where each wanted feature stands in them."""

    parts: tuple[tuple[int, str, struct.Struct | None, Lists], ...]
    """Place of the part, its class, its fixed type and its lists of numbers."""
    single: bool
    """Whether the row is one part alone."""
    order: tuple[tuple[int, int] | None, ...] | None
    """Part and place therein of each feature, none for one that the row lacks; none where they lie in order."""
    complete: bool


def _struct(dtypes: Iterable[str]) -> struct.Struct | None:
    codes = [_code(dtype) for dtype in dtypes]
    return None if None in codes else struct.Struct("<" + "".join(code for code in codes if code))


def _code(dtype: str) -> str | None:
    one, element = list_of(dtype), packed_element(dtype)
    if one is None or element is None or one.length is None:
        return _CODES.get(dtype)
    return f"{one.length * element.itemsize}s"


def _lists(dtypes: Iterable[str]) -> Lists:
    elements = [packed_element(dtype) for dtype in dtypes]
    return tuple((place, element) for place, element in enumerate(elements) if element is not None)


def with_lists(values: Sequence[Any], lists: Lists) -> Sequence[Any]:
    """A part's values with its lists of numbers as arrays."""
    found = list(values)
    for place, element in lists:
        if found[place] is not None:
            found[place] = np.frombuffer(found[place], element)
    return found


def columns_of(rows: bytes, fixed: struct.Struct) -> list[list[Any]]:
    """The values of rows of a fixed type that lie one behind the other, by column."""
    dtype, width = _uniform(fixed.format)
    if dtype is None:
        return [list(column) for column in zip(*fixed.iter_unpack(rows), strict=True)]
    columns: list[list[Any]] = np.frombuffer(rows, dtype).reshape(-1, width).T.tolist()
    return columns


@functools.cache
def _uniform(form: str) -> tuple[np.dtype[Any] | None, int]:
    """The one type of a struct's values, none where there are several, and how many they are."""
    order, codes = form[0], form[1:]
    return np.dtype(order + codes[0]) if len(set(codes)) == 1 else None, len(codes)
