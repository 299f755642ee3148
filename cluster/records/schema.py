"""Record types of the logs: a prediction, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)  # not frozen: creating a frozen record takes four times as long
class PredictionRecord:
    """One answer of a replica."""

    prediction_id: str
    request_id: str
    """The edge's id of the request; empty if the client called the replica directly."""
    time: str
    model: str
    version: int
    variant: str
    rollout: str
    """Id of the rollout; empty outside a rollout."""
    arm: str
    """`treatment`, `control`, `outside`, `none` (no unit given), or `shadow`."""
    unit_hash: str
    as_of: str
    entities: list[dict[str, Any]]
    features: dict[str, list[Any]]
    """Maps model input to one value per entity."""
    predictions: list[dict[str, Any]]
    """One prediction per entity, as in the answer."""
    given: list[str] = field(default_factory=list)
    """Inputs that the client sent. Older records do not have this field."""
    defaulted: dict[str, list[int]] = field(default_factory=dict)
    """Maps input to the rows where the feature service's default replaced a missing or expired value. Older records do
    not have this field."""
    fault: str = ""
    """Reason why the model gave no answer. Then `predictions` is empty, and the client got 503. For a copy that a
    shadow did not answer, it is `COPY_FAILED` or `COPY_REFUSED`, and the replica that sent the copy wrote the record.
    Older records do not have this field."""
    took_ms: float = 0.0
    """Time of reading the features and running the model, with the wait for a batch, in milliseconds. 0 if unknown;
    older records do not have this field."""
    cpu_ms: float = 0.0
    """CPU time of the same work, in milliseconds: of all threads of the model, and of a batch the part of this request.
    0 if unknown; older records do not have this field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomeRecord:
    """The outcome of one row of one answer."""

    prediction_id: str
    row: int = 0
    outcome: int | float | str
    """Class label, or value of a regression."""
    observed_at: str
    received_at: str


COPY_FAILED, COPY_REFUSED = "copy failed", "copy refused"
"""Faults of a shadow's copy that got no answer, or a 4xx answer."""
SHADOW = "shadow"
"""Arm and variant of a shadow's prediction, which no client gets."""
Record = PredictionRecord | OutcomeRecord
