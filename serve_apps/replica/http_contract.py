"""Limits and names of the HTTP contract. Replicas enforce the limits; edge and OpenAPI document use them, too."""

from __future__ import annotations

MAX_BODY_BYTES = 1_000_000
MAX_ENTITIES = 1000
"""Largest number of entities or tensor rows of a request. A push may have as many rows (`ingestion/pushed_rows.py`)."""
MAX_OUTCOMES = 10_000
"""Largest number of outcomes of a request."""
PREDICTION_ID_PATTERN = "[0-9a-zA-Z-]{1,64}"
PREDICTION_ID_HEADER = "x-falaj-prediction-id"
TRY_ANOTHER = 502
"""Status with which a replica asks the edge to send the request to another replica. The edge answers 503 if no replica
can answer."""
