"""Write many events to a ledger at once, instead of one transaction per event."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import sqlalchemy as sa

from cluster.ledger import Entry, Ledger, index
from cluster.ledger.chain import GENESIS
from cluster.ledger.database import EVENTS, POSITIONS
from cluster.ledger.events import LedgerEvent

_ROWS = 10_000
_START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_ACTOR = "user:loader"


def load_events(
    ledger: Ledger, events: Iterable[LedgerEvent], *, apart: dt.timedelta, indexed: bool = False
) -> None:
    """Append events as one chain, with the duration `apart` between the times of two events.

    The next read updates the projections and the event index, like the first read after an older release. With
    `indexed`, the event index is updated at once, like after normal appends.

    The payloads may contain only texts, whole numbers, lists and dicts. For these, JSON with sorted keys is already
    canonical, and it is much faster to write.
    """
    chain = _chain(ledger, events, apart)
    while rows := list(islice(chain, _ROWS)):
        with ledger.writing() as connection:
            connection.execute(EVENTS.insert(), rows)
            if indexed:
                index.add(
                    connection, [Entry(**row | {"payload": json.loads(row["payload"])}) for row in rows]
                )
                reached = POSITIONS.update().where(POSITIONS.c.name == index.NAME).values(seq=rows[-1]["seq"])
                connection.execute(reached)


def _chain(ledger: Ledger, events: Iterable[LedgerEvent], apart: dt.timedelta) -> Iterator[dict[str, Any]]:
    newest = sa.select(EVENTS.c.seq, EVENTS.c.hash).order_by(EVENTS.c.seq.desc()).limit(1)
    with ledger.engine.connect() as connection:
        last = connection.execute(newest).first()
    seq, prev_hash = (last.seq, last.hash) if last else (0, GENESIS)
    for event in events:
        seq += 1
        time = (_START + seq * apart).isoformat(timespec="microseconds")
        content = {name: getattr(event, name) for name in event.__dataclass_fields__}
        payload = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        body = (
            f'{{"actor":"{_ACTOR}","payload":{payload},"prev_hash":"{prev_hash}",'
            f'"seq":{seq},"time":"{time}","type":"{event.type}"}}'
        )
        digest = hashlib.sha256(body.encode()).hexdigest()
        yield {
            "seq": seq,
            "time": time,
            "type": event.type,
            "actor": _ACTOR,
            "payload": payload,
            "prev_hash": prev_hash,
            "hash": digest,
        }
        prev_hash = digest
