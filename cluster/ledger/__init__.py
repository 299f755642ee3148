"""The ledger: typed, hash-chained, append-only events; everything else the platform knows is a projection of it."""

from cluster.ledger.chain import Entry
from cluster.ledger.store import Ledger, open_ledger

__all__ = ["Entry", "Ledger", "open_ledger"]
