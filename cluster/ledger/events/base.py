"""What every event is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

Json = Any
"""str, int, float, bool, None, or lists and string-keyed dicts of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEvent:
    """Base of all events."""

    @property
    def type(self) -> str:
        return type(self).__name__

    def payload(self) -> dict[str, Json]:
        return dataclasses.asdict(self)
