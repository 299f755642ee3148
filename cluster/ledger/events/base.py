"""Base classes of the ledger's events."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

Json = Any
"""A JSON value: str, int, float, bool, None, a list of JSON values, or a dict from str to JSON values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEvent:
    """Base class of all events."""

    @property
    def type(self) -> str:
        return type(self).__name__

    def payload(self) -> dict[str, Json]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnknownEvent(LedgerEvent):
    """An event that a newer release wrote. This release does not know its type or some of its fields.

    Readers ignore the event, so that two releases can run at the same time. A reader that acts on the event's subject
    calls `require_known`, which refuses the event.
    """

    stored_type: str
    content: dict[str, Json]

    @property
    def type(self) -> str:
        return self.stored_type

    def payload(self) -> dict[str, Json]:
        return self.content
