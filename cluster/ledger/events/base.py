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


@dataclass(frozen=True, kw_only=True, slots=True)
class UnknownEvent(LedgerEvent):
    """An event that a newer release wrote: this release does not know its type, or not all of its fields.

    Readers pass over it, so that two releases can run side by side. A reader that acts on its subject calls
    `require_known`.
    """

    stored_type: str
    content: dict[str, Json]

    @property
    def type(self) -> str:
        return self.stored_type

    def payload(self) -> dict[str, Json]:
        return self.content
