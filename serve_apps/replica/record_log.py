"""The log of a replica. A request is answered only after its record was written. If writing fails, the answer is 503.

If this node's disk is full, the edge sends the request to another replica. If the database is restarted, requests wait
for it, up to `ANSWER_TIMEOUT_S`.

With `durability=disk`, an answer waits until its record is on the disk. One `fdatasync`, in a thread, is enough for all
requests that arrived since the previous `fdatasync` started (group commit). So a request waits for at most two calls
of `fdatasync`, however many requests there are at the same time. If an `fdatasync` fails, all requests that wait at
that moment get 503, and the next records are written to a new segment. The kernel may drop data that it could not
write, so a successful second `fdatasync` would prove nothing.

With `durability=shared`, an answer waits until its record is in the ledger's database. One transaction adds the records
of all requests that arrived since the previous transaction started. If it fails, or takes longer than
`ANSWER_TIMEOUT_S`, these requests get 503, and the next records are written to a new segment.

A replica without requests releases its segment when the segment is old, so that the segment can be compacted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.records.blocks import ANSWER_TIMEOUT_S, Block, BlockWriter, SegmentSealed
from cluster.records.location import MAX_AGE_S, AnyLog, location_of
from cluster.records.schema import Record
from cluster.records.segments import SegmentWriter
from cluster.security.keys.store import KeyStore
from cluster.settings import Durability
from serve_apps.replica.http import LOG, ReplicaUnavailable, Unavailable
from serve_apps.replica.timeouts import with_timeout

T = TypeVar("T")


class RecordLog:
    """Writes records and waits until they are durable. Only the event loop of the replica's requests may use it.

    Args:
        log: the log to write to.
        store, key: as for `SegmentWriter`.
        durability: what an answer waits for.
        max_age_s: maximum age of a segment in seconds.

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
        self._location = location
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
        self._thread = _new_thread()

    def append(self, *records: Record) -> None:
        """Write all of the records, or none of them.

        Raises:
            Unavailable: the disk is full or failed; later records may succeed.
        """
        try:
            self._writer.append(*records)
        except OSError as error:
            raise _unavailable(error, kind=ReplicaUnavailable) from error

    def _schedule_release(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._max_age_s, self._release_if_old)

    def _release_if_old(self) -> None:
        self._schedule_release()
        if not self._waiting and self._syncing is None:
            with contextlib.suppress(OSError):  # all requests of this segment were answered already
                self._writer.close_if_old()

    async def after_durable(self, answer: T, *, deadline: float | None = None) -> T:
        """Return `answer` when all records that were appended before this call are durable.

        Args:
            answer: the answer.
            deadline: monotonic time until which to wait; None waits until the write ends or fails.

        Raises:
            Unavailable: the disk failed, or the deadline has passed, so the answer must not be sent. The record may
                become durable later.
        """
        if self._timer is None:
            self._schedule_release()
        if self._on_disk or self._blocks is not None:
            if deadline is None:
                await self._wait_for_sync()
                return answer
            try:
                await with_timeout(max(0.0, deadline - time.monotonic()), self._wait_for_sync())
            except TimeoutError as error:
                raise _unavailable(OSError(errno.ETIMEDOUT, "the log does not answer")) from error
        return answer

    async def _wait_for_sync(self) -> None:
        synced = asyncio.get_running_loop().create_future()
        self._waiting.append(synced)
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync_groups())
        await synced

    async def _sync(self) -> None:
        """Make all records durable that were appended before this call."""
        if self._blocks is None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._writer.sync)
            return
        taken = self._writer.take_blocks()
        try:
            await self._add(self._blocks, taken.blocks)
        except Exception:
            self._writer.drop_blocks()
            raise
        finally:
            taken.close()

    async def _add(self, writer: BlockWriter, blocks: Sequence[Block]) -> None:
        """Add blocks in the thread. If the database does not answer, later blocks get a new connection and thread."""
        adding = asyncio.get_running_loop().run_in_executor(self._thread, writer.add, blocks)
        try:
            await asyncio.wait_for(adding, ANSWER_TIMEOUT_S)
        except TimeoutError as error:
            writer.abandon()
            self._thread.shutdown(wait=False)
            self._thread, self._blocks = _new_thread(), BlockWriter(self._location)
            raise OSError(errno.ETIMEDOUT, "the ledger's database does not answer") from error

    async def _sync_groups(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                await self._sync()
            except Exception as error:  # noqa: BLE001 (every waiting request must get the error)
                LOG.error("records could not be made durable", exc_info=error)
                # Another node seals a segment if this node was silent. Other replicas have segments of their own.
                kind = ReplicaUnavailable if isinstance(error, SegmentSealed) else Unavailable
                failed = _unavailable(error, kind=kind)
                # Requests that arrived meanwhile may have records in the same file, so these requests fail, too.
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


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "records")


def _unavailable(error: Exception, *, kind: type[Unavailable] = Unavailable) -> Unavailable:
    # The message does not contain the error's path, because clients see the message.
    reason = error.strerror if isinstance(error, OSError) else "the log failed"
    return kind(f"The record cannot be written, so there is no answer: {reason}. Try again later.")
