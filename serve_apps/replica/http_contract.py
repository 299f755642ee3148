"""Limits and names of the HTTP contract: replicas enforce them, the edge and the OpenAPI document state them."""

from __future__ import annotations

MAX_BODY_BYTES = 1_000_000
MAX_ENTITIES = 1000
"""Entities or tensor rows of one request. Pushes have the same limit (`store/ingestion/pushed_rows.py`)."""
MAX_OUTCOMES = 10_000
"""Outcomes of one request."""
PREDICTION_ID_PATTERN = "[0-9a-zA-Z-]{1,64}"
PREDICTION_ID_HEADER = "x-falaj-prediction-id"
