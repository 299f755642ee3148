"""A push: checked, on disk, online, and only then answered.

A pushed row goes online under its number in the push log, which orders it behind every row that has an `ingest_seq`:
the stream that takes it into the table will give it a greater one than all that were given out before, and pushes keep
their order there. Killed between disk and online, the client has no answer; it pushes again with the same key, and the
row goes online under the number it has. If it does not, the stream puts it there.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import InvalidRequest
from cluster.security.keys.store import KeyNotFound, KeyStore
from cluster.storage import Layout, local
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.pushed_rows import AT_ONCE, POSITION, CheckedRows, check_rows
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.online.events import put_online
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.streaming.push_log import Appended, PushLog, PushRecord
from feature_jobs.store.streaming.pushed_view import PushedView
from feature_jobs.store.types.schema import PROVISIONAL, SEQ


class Pusher:
    """Takes pushes of one view.

    Args:
        view: its newest version.
        places: where the push log and the table are.
        store: the online store, to be written to.
        log: the view's push log.
        ahead: how far a row's times may lie ahead of the clock.
        table_keys: by view, how a table stores its keys; filled here, and true for good.
    """

    def __init__(
        self,
        view: PushedView,
        places: Layout,
        store: OnlineStore,
        log: PushLog,
        *,
        ahead: Ahead = AT_ONCE,
        table_keys: dict[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._view, self._places, self._store, self._log = view, places, store, log
        self._ahead = ahead
        self._table_keys = {} if table_keys is None else table_keys

    def push(self, rows: Any, *, idempotency_key: str, digest: bytes, now: dt.datetime) -> dict[str, Any]:
        """The answer to a push, which is the same when it is repeated.

        Raises:
            InvalidRequest: rows that are none of this view, or a key that was used for others; nothing was stored.
            PushLogFull: nothing was stored.
            OnlineStoreUnavailable: the rows are safe, but not online; repeated with the same key they will be.
        """
        view = self._view.view
        key_types = self._known_key_types()
        checked = check_rows(rows, view, key_types=key_types, now=now, ahead=self._ahead)
        record = PushRecord(
            first=-1, rows=len(rows), view_version=self._view.spec.version, good=checked.good, bad=checked.bad
        )
        answer = {
            "view": view.name,
            "accepted": checked.good.num_rows,
            "quarantined": checked.reasons,
        }
        try:
            appended = self._log.append(idempotency_key, digest, record, answer)
        except KeyNotFound as error:
            raise InvalidRequest(
                f"View '{view.name}' was applied by an older release and has no key for pushes. Apply it again."
            ) from error
        if appended.again and not self._log.holds(appended.first):
            return (
                appended.answer
            )  # it is online under its `ingest_seq`, which its number must not take the place of
        good = _accepted_then(checked, appended)
        if good.num_rows:
            given = offline.key_types(good.schema, view.join_keys)
            frame = pl.DataFrame(pl.from_arrow(provisional(good, appended.first)))
            put_online(self._store, self._view.spec, given, frame)
        return appended.answer

    def _known_key_types(self) -> Mapping[str, str]:
        """As the table stores them; where it has none yet, as pushes before decided them online."""
        view = self._view.view
        if view.name not in self._table_keys:
            table = offline.open_table(self._places.features(view.name))
            if table is None:
                return self._store.key_types(view.name)
            self._table_keys[view.name] = offline.stored_key_types(table, view.join_keys)
        return self._table_keys[view.name]


def provisional(good: pa.Table, first: int) -> pa.Table:
    """Good rows of a push with the number they go by until they are in the table, in place of their position."""
    numbers = pc.add(good[POSITION], PROVISIONAL + first)
    return good.drop_columns([POSITION]).append_column(SEQ, numbers)


def open_log(places: Layout, view: str, keys: KeyStore) -> PushLog:
    """The push log of a view.

    Raises:
        ConfigError: the storage root is remote.
    """
    return PushLog(local(places.push(view)), view, keys)


def _accepted_then(checked: CheckedRows, appended: Appended) -> pa.Table:
    """The rows that were accepted when the push came first: a clock may judge a row otherwise by now."""
    if not appended.again:
        return checked.good
    bad = pa.array([row["row"] for row in appended.answer["quarantined"]], pa.int64())
    return checked.good.filter(pc.invert(pc.is_in(checked.good[POSITION], value_set=bad)))
