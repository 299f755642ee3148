"""The log of a replica: a request is answered only after its record was written; if that fails, the answer is 503.

With `durability=disk` an answer waits until its record is on the disk. One `fdatasync`, in a thread, serves all
requests that arrived since the previous one started (group commit). So a request waits for up to two of them, and the
disk's cost does not grow with the number of requests. If an `fdatasync` fails, all requests that waited for it get 503,
and the next records go into a new segment. The kernel may forget data that it could not write, so a second try would
prove nothing.

With `durability=shared` an answer waits until its record is in the ledger's database. One transaction adds the records
of all requests that arrived since the previous one started. If it fails, these requests get 503, and the next records
go into a new segment too.

A replica without requests releases its segment when the segment is old, so that it can be compacted.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.records import Record, SegmentWriter
from cluster.records.blocks import BlockWriter
from cluster.records.location import MAX_AGE_S, AnyLog, location_of
from cluster.security.keys.store import KeyStore
from cluster.settings import Durability
from serve_apps.replica.http import LOG, Unavailable

T = TypeVar("T")


class RecordLog:
    """Writes records and waits until they are durable; used from one event loop, that of the replica's requests.

    Args:
        log: the log to write to.
        store, key: as for `SegmentWriter`.
        durability: what an answer guarantees.
        max_age_s: maximum age of a segment.

    Raises:
        KeyNotFound, KeyRevoked, AccessDenied: the key store refuses the key.
        Unavailable: the disk is full or failed.
    """

    def __init__(
        self,
        log: AnyLog,
        *,
        store: KeyStore,
        key: str,
        durability: Durability,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        location = location_of(log)
        self._on_disk = durability is Durability.disk
        self._blocks = BlockWriter(location) if durability is Durability.shared else None
        self._max_age_s = max_age_s
        self._timer: asyncio.TimerHandle | None = None
        try:
            self._writer = SegmentWriter(
                location.folder,
                store=store,
                key=key,
                keep_unsynced=self._on_disk,
                keep_blocks=self._blocks is not None,
                max_age_s=max_age_s,
            )
        except OSError as error:
            raise _unavailable(error) from error
        self._waiting: list[asyncio.Future[None]] = []
        self._syncing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "records")

    def append(self, *records: Record) -> None:
        """Write records, all or none.

        Raises:
            Unavailable: the disk is full or failed; later records may succeed.
        """
        try:
            self._writer.append(*records)
        except OSError as error:
            raise _unavailable(error) from error

    def _schedule_release(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._max_age_s, self._release_if_old)

    def _release_if_old(self) -> None:
        self._schedule_release()
        if not self._waiting and self._syncing is None:
            with contextlib.suppress(OSError):  # the segment's requests have their answers already
                self._writer.close_if_old()

    async def after_durable(self, answer: T) -> T:
        """Return an answer after all records appended before are durable.

        Raises:
            Unavailable: the disk failed; the answer must not be given.
        """
        if self._timer is None:
            self._schedule_release()
        if self._on_disk or self._blocks is not None:
            await self._wait_for_sync()
        return answer

    async def _wait_for_sync(self) -> None:
        synced = asyncio.get_running_loop().create_future()
        self._waiting.append(synced)
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync_groups())
        await synced

    async def _sync(self) -> None:
        """Make all records durable that were appended before this call."""
        loop = asyncio.get_running_loop()
        if self._blocks is None:
            await loop.run_in_executor(self._thread, self._writer.sync)
            return
        taken = self._writer.take_blocks()
        try:
            await loop.run_in_executor(self._thread, self._blocks.add, taken.blocks)
        except Exception:
            self._writer.drop_blocks()
            raise
        finally:
            taken.close()

    async def _sync_groups(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                await self._sync()
            except Exception as error:  # noqa: BLE001 (every waiting request must get the error)
                LOG.error("records could not be made durable", exc_info=error)
                failed = _unavailable(error)
                # Records of requests that came meanwhile may be in the same file, so these fail as well.
                group, self._waiting = [*group, *self._waiting], []
                for synced in group:
                    if not synced.done():
                        synced.set_exception(failed)
            else:
                for synced in group:
                    if not synced.done():  # the client may have disconnected
                        synced.set_result(None)
        self._syncing = None

    def close(self) -> None:
        """Release the segment."""
        if self._timer is not None:
            self._timer.cancel()
        self._thread.shutdown()
        self._writer.close()
        if self._blocks is not None:
            self._blocks.close()


def _unavailable(error: Exception) -> Unavailable:
    # Without the error's path, because clients see the message.
    reason = error.strerror if isinstance(error, OSError) else "the log failed"
    return Unavailable(f"The record cannot be written, so there is no answer: {reason}. Try again later.")
