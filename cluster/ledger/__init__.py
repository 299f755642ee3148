"""The ledger: an append-only hash chain of typed events. All other state is a projection of it."""

from cluster.ledger.chain import Entry
from cluster.ledger.store import Ledger, open_ledger

__all__ = ["Entry", "Ledger", "open_ledger"]
