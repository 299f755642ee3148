"""What an engine of the online store does with bytes; keys, types and times are `online_store.py`'s.

A view has one meta, whose first bytes are its stamp, and rows by address. Rows belong to a generation. Every read and
write names the stamp that its caller goes by; when another meta lies there by now it is told so and nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

Rows = Sequence[tuple[bytes, bytes]]
"""Address and packed row."""
Carry = Callable[[Sequence[tuple[bytes, bytes, bytes | None]]], Rows]
"""Of rows that were put since the last switch, each with its address and the row that is staged there, those to take
along, packed for the new generation."""
NOTHING = b"\x00"
"""Stands for the rank of a row where none lies."""


@dataclass(frozen=True, slots=True)
class Write:
    """A row to be put where no greater one lies."""

    address: bytes
    packed: bytes
    expected: bytes = b""
    """If given, it is put only where the row of this rank lies, or none does."""


class Engine(Protocol):
    """Where the bytes of the online store lie; what cannot be reached or is full raises OnlineStoreUnavailable."""

    def meta(self, view: str) -> bytes | None:
        """A view's meta; none before its first row."""

    def rows(self, view: str, stamp: bytes, addresses: Sequence[bytes]) -> Sequence[bytes | None] | None:
        """Rows by address, none where there is none; none at all when the stamp has changed."""

    def put(self, view: str, stamp: bytes, writes: Sequence[Write]) -> int | None:
        """Compare and set, all in one transaction; gives how many were written, none when the stamp has changed."""

    def change(self, view: str, before: bytes | None, meta: bytes) -> bool:
        """Set a view's meta if it still has the stamp of before, none for no meta yet."""

    def stage(self, view: str, generation: bytes, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Write rows of a generation that nobody reads yet."""

    def switch(self, view: str, before: bytes | None, meta: bytes, carry: Carry) -> bool:
        """Have the staged generation read from now on, if the meta still has the stamp of before.

        No row that is put meanwhile is passed over by `carry`; readers see all of one generation or all of the other.
        """

    def close(self) -> None:
        """Let go of files and connections."""
