"""Merkle tree over the events of the ledger (RFC 9162, section 2.1): proves that an event is in a ledger.

The leaves are the hashes of all events, in order. A path of a few hashes leads from one event to the root, so the proof
reveals nothing about the other events. Anyone with an export of the ledger can compute the root again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from cluster.ledger.chain import Entry
from cluster.ledger.database import EVENTS
from cluster.ledger.store import Ledger

_LEAF, _NODE = b"\x00", b"\x01"
_PAGE = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeHead:
    """The tree over the first events of a ledger."""

    size: int
    """Number of events."""
    root: str
    """Hash of the root, in hex."""


class Tree:
    """The tree over a list of event hashes.

    Args:
        hashes: Hash of each event in hex, from the first event on.
    """

    def __init__(self, hashes: Iterable[str]) -> None:
        level = [hashlib.sha256(_LEAF + bytes.fromhex(text)).digest() for text in hashes]
        self._levels = [level]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            above = [_parent(left, right) for left, right in pairs]
            level = [*above, level[-1]] if len(level) % 2 else above
            self._levels.append(level)

    @property
    def head(self) -> TreeHead:
        """Size and root. The root of an empty tree is the hash of no bytes."""
        root = self._levels[-1][0] if self._levels[0] else hashlib.sha256().digest()
        return TreeHead(size=len(self._levels[0]), root=root.hex())

    def path(self, seq: int) -> list[str]:
        """Return the inclusion path of the event with this `seq`: hashes in hex, from the leaf's sibling upwards."""
        index, path = seq - 1, []
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                path.append(level[sibling].hex())
            index //= 2
        return path


def tree_of(ledger: Ledger) -> Tree:
    """Return the tree over all events that the ledger has now. Only the events' hashes are read."""
    return Tree(_hashes(ledger))


def is_included(entry: Entry, path: Sequence[str], head: TreeHead) -> bool:
    """Return whether a path proves that the event is in the tree, at its `seq` (RFC 9162, section 2.1.3.2).

    The caller must have compared the event's content with its hash (`chain.has_own_hash`).
    """
    index, last = entry.seq - 1, head.size - 1
    if not 0 <= index <= last:
        return False
    digest = hashlib.sha256(_LEAF + bytes.fromhex(entry.hash)).digest()
    for text in path:
        if last == 0:
            return False
        if index & 1 or index == last:
            digest = _parent(bytes.fromhex(text), digest)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            digest = _parent(digest, bytes.fromhex(text))
        index, last = index >> 1, last >> 1
    return last == 0 and digest.hex() == head.root


def _parent(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(_NODE + left + right).digest()


def _hashes(ledger: Ledger) -> Iterable[str]:
    after = 0
    while True:
        query = sa.select(EVENTS.c.seq, EVENTS.c.hash).where(EVENTS.c.seq > after)
        with ledger.engine.connect() as connection:
            rows = connection.execute(query.order_by(EVENTS.c.seq).limit(_PAGE)).all()
        yield from (row.hash for row in rows)
        if len(rows) < _PAGE:
            return
        after = rows[-1].seq
