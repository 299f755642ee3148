"""The data of a new project: readings of machines, and which machines failed within a week. It is made by a formula.

The probability of a failure is `1 / (1 + exp(-z))`, with z = 0.35 (heat - 30) + 1.6 (vibration - 4) + 1.5 (line is
west) - 2. Nothing else matters, so a good model finds exactly these three features. The same seed gives the same
values.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

SEED = 7
MACHINES, WEEKS = 400, 26
FIRST_READING = np.datetime64("2025-01-01T06:00:00", "us")
WEEK, DAY = np.timedelta64(7, "D"), np.timedelta64(1, "D")
LINES = np.array(["north", "south", "west"])
FIRST_LABEL, LABEL_EVERY = 4, 4
"""A label follows the readings of week 4, and of each fourth week after it."""


def machine_tables(*, seed: int = SEED) -> tuple[pa.Table, pa.Table]:
    """Return the readings, one per machine and week, and the labels: `machine_id`, `event_timestamp` and `failed`."""
    random = np.random.default_rng(seed)
    shape = (WEEKS, MACHINES)
    machines = np.broadcast_to(np.arange(MACHINES), shape)
    lines = LINES[np.broadcast_to(random.integers(len(LINES), size=MACHINES), shape)]
    room = random.normal(20, 3, shape)
    heat = random.normal(30, 1, MACHINES) + random.normal(0, 5, shape)
    vibration = np.maximum(random.normal(4, 0.2, MACHINES) + random.normal(0, 0.9, shape), 0.1)
    read_at = (
        FIRST_READING
        + np.arange(WEEKS)[:, None] * WEEK
        + random.integers(0, 3600, shape) * np.timedelta64(1, "s")
    )
    score = 0.35 * (heat - 30) + 1.6 * (vibration - 4) + 1.5 * (lines == "west") - 2
    failed = random.random(shape) < 1 / (1 + np.exp(-score))
    readings = pa.table(
        {
            "machine_id": machines.ravel(),
            "read_at": _times(read_at),
            "temperature": np.round(room + heat, 2).ravel(),
            "room_temperature": np.round(room, 2).ravel(),
            "vibration": np.round(vibration, 3).ravel(),
            "line": lines.ravel(),
        }
    )
    labelled = slice(FIRST_LABEL, None, LABEL_EVERY)
    labels = pa.table(
        {
            "machine_id": machines[labelled].ravel(),
            "event_timestamp": _times(read_at[labelled] + DAY),
            "failed": failed[labelled].astype(np.int64).ravel(),
        }
    )
    return readings, labels


def _times(values: np.ndarray[tuple[int, ...], np.dtype[np.datetime64]]) -> pa.Array:
    return pa.array(values.ravel(), pa.timestamp("us", tz="UTC"))
