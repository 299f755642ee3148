"""What is recorded: a prediction, and what came true for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)  # frozen, one takes four times as long to make
class PredictionRecord:
    """One answer of a replica."""

    prediction_id: str
    request_id: str
    """The edge's id of the request, empty when the replica was addressed directly."""
    time: str
    model: str
    version: int
    variant: str
    rollout: str
    """Empty outside any rollout."""
    arm: str
    """`treatment`, `control`, `outside`, `none` (no unit given), or `shadow`."""
    unit_hash: str
    as_of: str
    entities: list[dict[str, Any]]
    features: dict[str, list[Any]]
    """Model input to one value per entity."""
    predictions: list[dict[str, Any]]
    """As answered."""
    given: list[str] = field(default_factory=list)
    """Inputs that the client gave itself; older records do not have it."""
    defaulted: dict[str, list[int]] = field(default_factory=dict)
    """Input to the rows whose value was missing or expired, and is the feature service's default; older records do
    not have it."""
    fault: str = ""
    """Why the model gave no answer: `predictions` is empty then, and the client got 503. Older records do not have
    it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomeRecord:
    """What came true for one row of one answer."""

    prediction_id: str
    row: int = 0
    outcome: int | float | str
    """Class label, or value of a regression."""
    observed_at: str
    received_at: str


SHADOW = "shadow"
"""Arm and variant of a prediction that no client has seen."""
Record = PredictionRecord | OutcomeRecord
