"""Assign units to arms. The edge uses exactly the same rule.

A bucket is `xxh32(salt + ":" + unit) mod 10000`, unsigned, seed 0, over the unit's raw bytes. The treatment has the
buckets from 0 upwards. The control arm has the same number of buckets from 9999 downwards. So a larger weight never
moves a unit from one arm to the other. If the weight is above 50 %, control gets only the remaining buckets, and the
arms cannot be compared any more.
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass

import xxhash

BUCKETS = 10_000
CHAMPION_VARIANT = "champion"
"""Variant of the champion in records. The variant that the champion was deployed with does not matter."""
PREDECESSOR_VARIANT = "predecessor"
"""Variant of the champion before a promotion, while a holdback keeps it. In the edge's map it says that control gets
the other version, and the treatment the champion."""
RESERVED_VARIANTS = (CHAMPION_VARIANT, PREDECESSOR_VARIANT)
HOLDBACK_WEIGHT = 1.0
"""Percent of the units that a holdback keeps. As many others are compared with them."""
_WATCH = "-watch"
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def require_variant(name: str) -> None:
    """Validate a variant's name. The name is used in the edge's map, in headers, records and file names.

    Raises:
        ValueError: the name has characters that are not allowed, or is too long.
    """
    if not _VARIANT.fullmatch(name):
        raise ValueError(
            f"variant must be a letter or digit and then letters, digits, '.', '_' and '-', at most 64, got '{name}'."
        )


class UnitKind(enum.StrEnum):
    """What names the unit of a request. A request without it is outside any experiment."""

    header = "header"
    """The header `X-Unit-ID`. The client chooses it."""
    subject = "subject"
    """The token's `sub`, in UTF-8. The edge has verified it, so a client cannot change it."""


class Arm(enum.StrEnum):
    """Arm that a unit belongs to in a rollout."""

    treatment = "treatment"
    control = "control"
    outside = "outside"
    """The unit is outside the experiment, and the champion answers."""
    none = "none"
    """The request names no unit, so it is outside any experiment, and the champion answers."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of the arms: treatment has the buckets below the first bound, control those from the second bound on."""

    treatment_below: int
    control_from: int


def require_percent(value: float, *, name: str) -> None:
    """Validate a share in percent: at least one bucket, and a whole number of buckets.

    Raises:
        ValueError: the value is not 0.01 to 100 percent in steps of 0.01.
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


def watch_id(rollout: str) -> str:
    """Return the id under which the requests after a rollout's promotion are recorded and counted."""
    return f"{rollout}{_WATCH}"


def is_watch(rollout: str) -> bool:
    """Return whether a recorded rollout id is that of the time after a promotion."""
    return rollout.endswith(_WATCH)


def mixes_arms(reached: float, weight: float) -> bool:
    """Return whether a new weight, with the same salt, would move units from treatment to control.

    Args:
        reached: the greatest weight of this rollout so far.
        weight: the new weight.
    """
    return bounds(reached).treatment_below > bounds(weight).control_from


def bucket(salt: str, unit: bytes) -> int:
    """Return a unit's bucket, 0 to 9999."""
    return int(xxhash.xxh32_intdigest(salt.encode() + b":" + unit)) % BUCKETS


def assign(salt: str, unit: bytes, limits: Bounds) -> Arm:
    """Return a unit's arm. For an empty unit, return `Arm.none`."""
    if not unit:
        return Arm.none
    unit_bucket = bucket(salt, unit)
    if unit_bucket < limits.treatment_below:
        return Arm.treatment
    return Arm.control if unit_bucket >= limits.control_from else Arm.outside
