"""How many different values, from 4,096 small registers: HyperLogLog (Flajolet, Fusy, Gandouet and Meunier 2007).

The standard error is 1.04 / sqrt(4096) = 1.6 %. The estimate is Ertl's (arXiv 1702.01284, algorithm 6), which has that
error over the whole range; the original one with its correction for small counts is biased where it changes from one
formula to the other. Registers depend on the set of values only, so that offline and online, one set or several merged
ones, all give the same number.
"""

from __future__ import annotations

import datetime as dt
import math
import struct
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash

PRECISION = 12
REGISTERS = 1 << PRECISION
_RANK_BITS = 64 - PRECISION
_ALPHA = 1 / (2 * math.log(2))
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

Registers = npt.NDArray[np.uint8]
Value = str | int | float | dt.datetime | dt.date


def value_hash(value: Value) -> int:
    """The xxHash64 of a value's canonical bytes: text in UTF-8, the others as 8 bytes little-endian."""
    match value:
        case str():
            content = value.encode()
        case dt.datetime():
            content = struct.pack("<q", (value - _EPOCH) // dt.timedelta(microseconds=1))
        case dt.date():
            content = struct.pack("<q", (value - _EPOCH.date()).days)
        case float():
            content = struct.pack("<d", value + 0.0)
        case _:
            content = struct.pack("<q", value)
    return xxhash.xxh64_intdigest(content)


def places_and_ranks(
    hashes: npt.NDArray[np.uint64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Which register a hash goes to, by its first bits, and the position of the first set bit in the rest."""
    places = (hashes >> np.uint64(_RANK_BITS)).astype(np.int64)
    rest = hashes & np.uint64((1 << _RANK_BITS) - 1)
    # Below 2 ** 53 a float64 holds the bits exactly, and its exponent says which is the highest.
    highest = np.frexp(rest.astype(np.float64))[1]
    return places, (_RANK_BITS + 1 - highest).astype(np.uint8)


def registers_of(values: Iterable[Value]) -> Registers:
    """The registers of a set of values."""
    hashes = np.fromiter(map(value_hash, values), np.uint64)
    registers = np.zeros(REGISTERS, np.uint8)
    places, ranks = places_and_ranks(hashes)
    np.maximum.at(registers, places, ranks)
    return registers


def estimate(registers: Registers) -> int:
    """The estimated number of different values."""
    found = np.bincount(registers, minlength=_RANK_BITS + 2).tolist()
    total = REGISTERS * _tau(1 - found[_RANK_BITS + 1] / REGISTERS)
    for rank in range(_RANK_BITS, 0, -1):
        total = 0.5 * (total + found[rank])
    total += REGISTERS * _sigma(found[0] / REGISTERS)
    return 0 if math.isinf(total) else round(_ALPHA * REGISTERS * REGISTERS / total)


def beyond(exact: int, registers: Registers) -> int:
    """The estimate, where there are known to be more than `exact` different values."""
    return max(estimate(registers), exact + 1)


def _sigma(share: float) -> float:
    """x + the sum of x ** (2 ** k) * 2 ** (k - 1) over k from 1."""
    if share == 1:
        return math.inf
    total, power, weight = share, share, 1.0
    while True:
        power *= power
        before = total
        total += power * weight
        weight *= 2
        if total == before:
            return total


def _tau(share: float) -> float:
    """A third of 1 - x - the sum of (1 - x ** (2 ** -k)) ** 2 * 2 ** -k over k from 1."""
    if share in (0, 1):
        return 0.0
    total, root, weight = 1 - share, share, 1.0
    while True:
        root = math.sqrt(root)
        before = total
        weight *= 0.5
        total -= (1 - root) ** 2 * weight
        if total == before:
            return total / 3
