"""Process a push: check its rows, append them to the push log, put them online, then answer.

A pushed row goes online under a provisional number, made from its number in the push log. That number is greater than
every `ingest_seq`. This is the right order: the stream that stores the row in the table will give it a greater
`ingest_seq` than all earlier rows, and keeps the order of pushes.

If the process is killed after the append, the client gets no answer. It pushes again with the same idempotency key, and
the rows go online under the numbers that they have. If it does not push again, the stream puts them online.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import InvalidRequest
from cluster.ledger import Ledger
from cluster.security.keys.store import KeyNotFound, KeyStore
from cluster.storage import Layout, local
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.pushed_rows import ONLINE_FUTURE_LIMIT, POSITION, CheckedRows, check_rows
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.online.events import put_online
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.streaming.micro_batches import with_sequence
from feature_jobs.store.streaming.push_log import Appended, PushLog, PushRecord
from feature_jobs.store.streaming.push_tables import import_lmdb_log
from feature_jobs.store.streaming.pushed_view import PushedView
from feature_jobs.store.types.schema import PROVISIONAL


class Pusher:
    """Accepts the pushes of one view.

    Args:
        view: the newest version of the view.
        places: folders of the installation.
        store: the online store, opened for writing.
        log: push log of the view.
        ahead: how far a row's times may be ahead of the clock.
        table_keys: cache of the tables' key types by view. This class fills it; a table's key types never change.
    """

    def __init__(
        self,
        view: PushedView,
        places: Layout,
        store: OnlineStore,
        log: PushLog,
        *,
        ahead: FutureLimit = ONLINE_FUTURE_LIMIT,
        table_keys: dict[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._view, self._places, self._store, self._log = view, places, store, log
        self._ahead = ahead
        self._table_keys = {} if table_keys is None else table_keys

    def push(self, rows: Any, *, idempotency_key: str, digest: bytes, now: dt.datetime) -> dict[str, Any]:
        """Store rows and return the answer to the client. A repeated push gets the same answer.

        Args:
            rows: rows of the request.
            idempotency_key: the client's key.
            digest: hash of the request.
            now: current time.

        Raises:
            InvalidRequest: the rows do not fit the view, or the key was used for another push. Nothing was stored.
            PushLogFull: the log is full. Nothing was stored.
            PushLogUnavailable: the log's database failed. The same push can be repeated.
            OnlineStoreUnavailable: the rows are in the log, but not online. A repeated push puts them online.
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
        if appended.repeated and not self._log.contains(appended.first):
            # The rows are online under their `ingest_seq`. The provisional numbers must not replace it.
            return appended.answer
        good = _first_accepted(checked, appended)
        if good.num_rows:
            types = offline.key_types(good.schema, view.join_keys)
            frame = pl.DataFrame(pl.from_arrow(provisional(good, appended.first)))
            put_online(self._store, self._view.spec, types, frame)
        return appended.answer

    def _known_key_types(self) -> Mapping[str, str]:
        """Return the key types of the table. Without a table, return those of earlier pushes, from the online store."""
        view = self._view.view
        if view.name not in self._table_keys:
            table = offline.open_table(self._places.features(view.name))
            if table is None:
                return self._store.key_types(view.name)
            self._table_keys[view.name] = offline.stored_key_types(table, view.join_keys)
        return self._table_keys[view.name]


def provisional(good: pa.Table, first: int) -> pa.Table:
    """Replace the position of each good row of a push by its provisional sequence number.

    The row has this number until it is in the table.
    """
    return with_sequence(good, PROVISIONAL + first)


def open_push_log(ledger: Ledger, places: Layout, view: str, keys: KeyStore) -> PushLog:
    """Open the push log of a view. A log that an older release wrote on this machine's disk is moved into it."""
    import_lmdb_log(ledger, view, local(places.push(view)))
    return PushLog(ledger, view, keys)


def _first_accepted(checked: CheckedRows, appended: Appended) -> pa.Table:
    """Return the rows that were accepted at the first push. A check against the clock may now have another result."""
    if not appended.repeated:
        return checked.good
    bad = pa.array([row["row"] for row in appended.answer["quarantined"]], pa.int64())
    return checked.good.filter(pc.invert(pc.is_in(checked.good[POSITION], value_set=bad)))
