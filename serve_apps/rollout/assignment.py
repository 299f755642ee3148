"""Assign units to arms, exactly as the edge does.

A bucket is `xxh32(salt + ":" + unit) mod 10000`, unsigned, seed 0, over the unit's raw bytes. The treatment takes
buckets from 0 upwards. Its concurrent control arm takes the same number from 9999 downwards. So a larger weight never
moves a unit from one arm to the other. Above 50 % the arms meet: control gets only the rest, and the arms can no longer
be compared.
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass

import xxhash

BUCKETS = 10_000
CHAMPION_VARIANT = "champion"
"""The champion's name in records, whatever variant it was deployed as."""
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def require_variant(name: str) -> None:
    """Validate a variant's name, which is used in the edge's map, in headers, records and file names.

    Raises:
        ValueError: the name has other characters, or is too long.
    """
    if not _VARIANT.fullmatch(name):
        raise ValueError(
            f"variant must be a letter or digit and then letters, digits, '.', '_' and '-', at most 64, got '{name}'."
        )


class Arm(enum.StrEnum):
    """Part of a unit in a rollout."""

    treatment = "treatment"
    control = "control"
    outside = "outside"
    """The champion answers, outside the experiment."""
    none = "none"
    """The request names no unit: the champion answers, outside any experiment."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of the arms, in buckets: treatment is below the first, control at or above the second."""

    treatment_below: int
    control_from: int


def require_percent(value: float, *, name: str) -> None:
    """Validate a share in percent: at least one bucket, and a whole number of buckets.

    Raises:
        ValueError: it is not 0.01 to 100 percent in steps of 0.01.
    """
    buckets = value * BUCKETS / 100 if math.isfinite(value) else 0.0
    if not 1 <= round(buckets) <= BUCKETS or abs(buckets - round(buckets)) > 1e-6:
        raise ValueError(f"{name} must be 0.01 to 100 percent, in steps of 0.01, got {value}.")


def bounds(weight: float) -> Bounds:
    """Return the bounds for a treatment weight in percent.

    Raises:
        ValueError: the weight is outside 0 to 100.
    """
    if not 0 <= weight <= 100:
        raise ValueError(f"A weight must be 0 to 100 percent, got {weight}.")
    treatment = round(weight * BUCKETS / 100)
    return Bounds(treatment, max(BUCKETS - treatment, treatment))


def mixes_arms(reached: float, weight: float) -> bool:
    """Return whether a new weight would make some treated units control, under the same salt.

    Args:
        reached: the greatest weight so far.
        weight: the new weight.
    """
    return bounds(reached).treatment_below > bounds(weight).control_from


def bucket(salt: str, unit: bytes) -> int:
    """Return a unit's bucket, 0 to 9999."""
    return int(xxhash.xxh32_intdigest(salt.encode() + b":" + unit)) % BUCKETS


def assign(salt: str, unit: bytes, limits: Bounds) -> Arm:
    """Return a unit's arm; an empty unit gives `Arm.none`."""
    if not unit:
        return Arm.none
    unit_bucket = bucket(salt, unit)
    if unit_bucket < limits.treatment_below:
        return Arm.treatment
    return Arm.control if unit_bucket >= limits.control_from else Arm.outside
