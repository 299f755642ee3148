"""How far streams have come into a feature table: said by its own commits, so that data and position cannot differ."""

from __future__ import annotations

from deltalake import DeltaTable

from feature_jobs.store.offline import last_seq
from feature_jobs.store.online_rows import Horizon

PUSH_APP = "falaj.push"
"""Application transaction: the last row of the push log that the table has."""


def horizon(table: DeltaTable) -> Horizon:
    """What of the online store is in this version of the table."""
    return Horizon(seq=last_seq(table), offset=pushed(table))


def pushed(table: DeltaTable) -> int:
    """The number of the last pushed row that is in the table, -1 where none is."""
    number = table.transaction_version(PUSH_APP)
    return -1 if number is None else int(number)
