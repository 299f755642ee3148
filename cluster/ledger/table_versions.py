"""Finds the table versions that have no event in the ledger, because a job was killed between commit and event."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from cluster.ledger.events import Json, LedgerEvent
from cluster.ledger.store import Ledger


def unrecorded(
    ledger: Ledger, kind: type[LedgerEvent], versions: Iterable[int], **subject: Json
) -> list[int]:
    """Return the given table versions that have no event, in ascending order.

    Events of a table are appended in the order of its versions, and no version is left out. So if a version has an
    event, all versions before it have events too.

    Args:
        ledger: The ledger.
        kind: Type of the events. It must have the field `table_version`.
        versions: Versions of the table that should have an event of this type.
        subject: The field that names the table, such as `view`, with its value.
    """

    def is_missing(version: int) -> bool:
        return ledger.newest(kind, table_version=version, **subject) is None

    return sorted(takewhile(is_missing, sorted(versions, reverse=True)))
