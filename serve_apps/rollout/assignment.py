"""Which arm a unit belongs to, computed here just as the edge computes it.

A bucket is `xxh32(salt + ":" + unit) mod 10000`, unsigned, seed 0, over the unit's raw bytes. Treatment takes buckets
from 0 upwards and its concurrent control arm as many from 9999 downwards, so that ramping up never moves a unit from
one arm to the other. Beyond 50 % the arms meet: control gets what is left, and inference has ended.
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass

import xxhash

BUCKETS = 10_000
CHAMPION_VARIANT = "champion"
"""What records call the champion, whatever it was deployed as."""
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def require_variant(name: str) -> None:
    """A variant's name stands in the edge's map, in headers, records and names of files.

    Raises:
        ValueError
    """
    if not _VARIANT.fullmatch(name):
        raise ValueError(
            f"variant must be a letter or digit and then letters, digits, '.', '_' and '-', at most 64, got '{name}'."
        )


class Arm(enum.StrEnum):
    """A unit's part in a rollout."""

    treatment = "treatment"
    control = "control"
    outside = "outside"
    """The champion answers, outside the experiment."""
    none = "none"
    """The request named no unit: the champion answers, outside any experiment."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Two bounds in buckets: treatment is below the first, control at or above the second."""

    treatment_below: int
    control_from: int


def require_percent(value: float, *, name: str) -> None:
    """A share is at least one bucket, and a whole number of them.

    Raises:
        ValueError
    """
    buckets = value * BUCKETS / 100 if math.isfinite(value) else 0.0
    if not 1 <= round(buckets) <= BUCKETS or abs(buckets - round(buckets)) > 1e-6:
        raise ValueError(f"{name} must be 0.01 to 100 percent, in steps of 0.01, got {value}.")


def bounds(weight: float) -> Bounds:
    """The bounds of a treatment weight in percent.

    Raises:
        ValueError: the weight is outside 0 to 100.
    """
    if not 0 <= weight <= 100:
        raise ValueError(f"A weight is 0 to 100 percent, got {weight}.")
    treatment = round(weight * BUCKETS / 100)
    return Bounds(treatment, max(BUCKETS - treatment, treatment))


def mixes_arms(reached: float, weight: float) -> bool:
    """Whether at a weight some units are control that were treated at an earlier one, of the same salt.

    Args:
        reached: the greatest weight so far.
        weight: the next one.
    """
    return bounds(reached).treatment_below > bounds(weight).control_from


def bucket(salt: str, unit: bytes) -> int:
    """A unit's bucket, 0 to 9999."""
    return int(xxhash.xxh32_intdigest(salt.encode() + b":" + unit)) % BUCKETS


def assign(salt: str, unit: bytes, limits: Bounds) -> Arm:
    """A unit's arm; an empty unit counts as none."""
    if not unit:
        return Arm.none
    place = bucket(salt, unit)
    if place < limits.treatment_below:
        return Arm.treatment
    return Arm.control if place >= limits.control_from else Arm.outside
