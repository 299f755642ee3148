"""The interface of an engine of the online store. Engines handle bytes; `store.py` handles keys, types and times.

For each view, an engine stores rows by address, and one meta that says how to read them (`meta.py`). Each new meta
starts with a new stamp, a unique id. A caller reads the meta first, and passes its stamp to every read and write. If
another process has replaced the meta since then, the call changes nothing and returns None or False. Rows belong to a
generation: a materialisation writes a new generation and then switches to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Rows = Sequence[tuple[bytes, bytes]]
"""Address and packed row."""


class RecentRow(NamedTuple):
    """A row that was put since the last switch."""

    address: bytes
    packed: bytes
    staged: bytes | None
    """The row of the staged generation at the same address."""


Carry = Callable[[Sequence[RecentRow]], Rows]
"""Selects the recent rows that the new generation takes over, and packs them for it."""
NOTHING = b"\x00"
"""The rank to expect if there must be no row yet."""


@dataclass(frozen=True, slots=True)
class Write:
    """A row to write if the stored row has a smaller rank."""

    address: bytes
    packed: bytes
    expected: bytes = b""
    """If given, the row is written only if the stored row has exactly this rank (`NOTHING`: if there is no row)."""


class Engine(Protocol):
    """Storage for the bytes of the online store. Methods raise OnlineStoreUnavailable if it is unreachable or full."""

    def meta(self, view: str) -> bytes | None:
        """Return a view's meta; None before its first row."""

    def rows(self, view: str, stamp: bytes, addresses: Sequence[bytes]) -> Sequence[bytes | None] | None:
        """Return the rows at some addresses, None for a missing row. If the stamp has changed, return None."""

    def put(self, view: str, stamp: bytes, writes: Sequence[Write]) -> int | None:
        """Compare and set rows in one transaction; return the number written, or None if the stamp has changed."""

    def set_meta(self, view: str, expected: bytes | None, meta: bytes) -> bool:
        """Set a view's meta if its stamp is still the expected one (None: no meta yet); return whether it was set."""

    def stage(self, view: str, generation: bytes, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Write rows of a generation that is not read yet."""

    def switch(self, view: str, expected: bytes | None, meta: bytes, carry: Carry) -> bool:
        """Make the staged generation the current one if the stamp is still the expected one; return whether it was.

        `carry` gets every row that is put in the meantime. Readers see all of one generation or all of the other.
        """

    def close(self) -> None:
        """Close files and connections."""
