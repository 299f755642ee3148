"""Statistics of a batch, with which the next batch is compared. `ingestion/profiling.py` computes them.

A profile contains no row, no minimum and no maximum. But its quartiles and categories are values, so it is stored
beside the quarantine, encrypted with the quarantine's key. The ledger gets only `summary`: the number of rows, and the
number of nulls of each column.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """The distribution of a feature's values. Stored profiles have these field names."""

    counts: list[int]
    edges: list[float] | None = None
    """For numbers: ascending cut points. A bin includes its upper cut point; the last bin has no upper one."""
    categories: list[Any] | None = None
    """For categories: the most frequent values. The last entry of `counts` is for all other values."""
    quartiles: list[float] | None = None
    """For numbers: the three quartiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Statistics of a batch, of bounded size. Stored profiles and events have these field names."""

    rows_in: int
    rows: int
    """Number of rows without those in quarantine."""
    nulls: dict[str, int]
    """Number of nulls in all rows, by feature."""
    newest_event_us: int | None
    distributions: dict[str, Distribution]

    def summary(self) -> dict[str, Any]:
        """Return the part that may be in the ledger, because it contains no value."""
        return {"rows_in": self.rows_in, "rows": self.rows, "nulls": self.nulls}

    def to_json(self) -> str:
        """Return the whole profile as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Return the profile from the text of `to_json`."""
        data = json.loads(text)
        distributions = {name: Distribution(**fields) for name, fields in data.pop("distributions").items()}
        return cls(**data, distributions=distributions)
