"""Lines of access files."""

from __future__ import annotations

import json
from typing import Any

ROLLOUT_ID = "r1"
GOOD: dict[str, Any] = {
    "time": 1_800_000_000.0,
    "ended_ms": 1_800_000_000_000,
    "request_id": "id",
    "model": "m",
    "action": "predict",
    "principal": "t",
    "path": "/v1/models/m:predict",
    "rollout": ROLLOUT_ID,
    "arm": "treatment",
    "below": "2000",
    "variant": "challenger",
    "fallback": "-",
    "unit_hash": "A" * 16,
    "status": 200,
    "latency_ms": 3,
    "prediction_id": "p",
    "termination": "--",
}
"""A good answer of the treatment, at a weight of 20 %."""


def line(**fields: Any) -> bytes:
    """Return the line of a good answer, with other values in these fields. The variant fits to the arm."""
    arm = fields.get("arm", "treatment")
    variant = {"variant": "challenger" if arm == "treatment" else "champion"}
    return json.dumps(GOOD | variant | fields).encode() + b"\n"
