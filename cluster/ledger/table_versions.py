"""Which versions of a table the ledger has no event for yet: those of jobs that were killed after their commit."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from cluster.ledger.events import Json, LedgerEvent
from cluster.ledger.store import Ledger


def unrecorded(
    ledger: Ledger, kind: type[LedgerEvent], versions: Iterable[int], **subject: Json
) -> list[int]:
    """Return the table versions that have no event, ascending.

    Events of a table are appended in the order of its versions, and no version is left out. So all versions before the
    newest recorded one are recorded.

    Args:
        ledger: The ledger.
        kind: Type of the events. They have the field `table_version`.
        versions: Versions of the table that such an event belongs to.
        subject: The field that names the table, such as `view`.
    """

    def is_missing(version: int) -> bool:
        return ledger.newest(kind, table_version=version, **subject) is None

    return sorted(takewhile(is_missing, sorted(versions, reverse=True)))
