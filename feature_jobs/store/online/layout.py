"""The layout in which a version of a view packs its online values, and the plan by which another version reads them."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import msgpack
import numpy as np

from feature_jobs.store.types.dtypes import list_of, packed_element_dtype

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
"""Index and element type of each list of numbers in a part. Such lists are packed as bytes."""


class Layout:
    """The order in which one version of a view packs its values: by column class, within a class by field.

    If all fields of a class have a fixed width, they are packed as a struct, unless the row is loose (`is_loose`).
    Other classes are packed with msgpack. A list of numbers is packed as its elements one after the other,
    little-endian; with a declared length it has a fixed width.
    """

    def __init__(self, version: str, fields: Iterable[Sequence[str]]) -> None:
        """Create the layout of a version, from the name, dtype and column class of each field."""
        self.version = version
        self.fields = tuple((name, dtype, sensitivity) for name, dtype, sensitivity in fields)
        indices: dict[str, list[int]] = {}
        for index, (_, _, sensitivity) in enumerate(self.fields):
            indices.setdefault(sensitivity, []).append(index)
        self.classes = tuple(indices)
        self.indices = tuple(indices.values())
        dtypes = [[self.fields[index][1] for index in of_class] for of_class in self.indices]
        self.structs = tuple(_struct(of_class) for of_class in dtypes)
        self.lists = tuple(_lists(of_class) for of_class in dtypes)
        list_types = [list_of(dtype) for _, dtype, _ in self.fields]
        self.lengths = [(index, kind.length) for index, kind in enumerate(list_types) if kind and kind.length]

    def is_loose(self, values: Sequence[Any]) -> bool:
        """Return whether a row is packed without fixed widths.

        That is the case if it has a null, or a list without the declared length. A row that was stored under an earlier
        definition can have such a list.
        """
        if not any(self.lists):
            return None in values
        if any(value is None for value in values):  # `in` would compare arrays element by element
            return True
        return any(len(values[index]) != length for index, length in self.lengths)

    def groups(self, values: Sequence[Any], *, loose: bool) -> list[bytes]:
        """Return a row's values as bytes, one item per column class."""
        groups = []
        for indices, fixed, lists in zip(self.indices, self.structs, self.lists, strict=True):
            group = [values[index] for index in indices]
            for position, element in lists:
                if group[position] is not None:
                    group[position] = np.asarray(group[position], element).tobytes()
            packed = msgpack.packb(group) if fixed is None or loose else fixed.pack(*group)
            groups.append(packed)
        return groups

    def plan(self, wanted: Iterable[Sequence[str]]) -> Plan:
        """Return the plan by which rows of this layout are read as another version's features.

        Args:
            wanted: name and dtype of each feature to read.
        """
        stored = {
            (name, dtype): (number, position)
            for number, indices in enumerate(self.indices)
            for position, (name, dtype, _) in enumerate(self.fields[index] for index in indices)
        }
        order = [stored.get((name, dtype)) for name, dtype, *_ in wanted]
        numbers = sorted({source[0] for source in order if source is not None})
        stored_order = [(0, position) for position in range(len(self.fields))]
        return Plan(
            parts=tuple(
                Part(number, self.classes[number], self.structs[number], self.lists[number])
                for number in numbers
            ),
            single=len(self.classes) == 1,
            order=None if len(self.classes) == 1 and order == stored_order else tuple(order),
            complete=None not in order,
        )


class Part(NamedTuple):
    """The values of one column class in a row."""

    number: int
    """Index of the part in the row."""
    sensitivity: str
    """The column class."""
    fixed: struct.Struct | None
    """The struct format; None for msgpack."""
    lists: Lists


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts of a row to unpack, and the position of each wanted feature in these parts."""

    parts: tuple[Part, ...]
    single: bool
    """Whether the row has only one part."""
    order: tuple[tuple[int, int] | None, ...] | None
    """For each feature, the number of its part and the position in this part. None if the row lacks the feature.

    None instead of the tuple if one part has all features in the wanted order.
    """
    complete: bool
    """Whether the row has all wanted features."""


def _struct(dtypes: Iterable[str]) -> struct.Struct | None:
    codes = [_code(dtype) for dtype in dtypes]
    return None if None in codes else struct.Struct("<" + "".join(code for code in codes if code))


def _code(dtype: str) -> str | None:
    list_type, element = list_of(dtype), packed_element_dtype(dtype)
    if list_type is None or element is None or list_type.length is None:
        return _CODES.get(dtype)
    return f"{list_type.length * element.itemsize}s"


def _lists(dtypes: Iterable[str]) -> Lists:
    elements = [packed_element_dtype(dtype) for dtype in dtypes]
    return tuple((position, element) for position, element in enumerate(elements) if element is not None)


def with_lists(values: Sequence[Any], lists: Lists) -> Sequence[Any]:
    """Return a part's values with its lists of numbers as arrays."""
    unpacked = list(values)
    for position, element in lists:
        if unpacked[position] is not None:
            unpacked[position] = np.frombuffer(unpacked[position], element)
    return unpacked


def columns_of(rows: bytes, fixed: struct.Struct) -> list[list[Any]]:
    """Return, by column, the values of packed rows of a fixed format."""
    dtype, width = _uniform(fixed.format)
    if dtype is None:
        return [list(column) for column in zip(*fixed.iter_unpack(rows), strict=True)]
    columns: list[list[Any]] = np.frombuffer(rows, dtype).reshape(-1, width).T.tolist()
    return columns


@functools.cache
def _uniform(form: str) -> tuple[np.dtype[Any] | None, int]:
    """Return the common type of a struct's values, None if there are several types, and the number of values."""
    order, codes = form[0], form[1:]
    return np.dtype(order + codes[0]) if len(set(codes)) == 1 else None, len(codes)
