"""A replica's log: nothing is answered that is not written down, and 503 says so where it cannot be.

With `durability=disk` an answer waits until its record is on the disk. One `fdatasync` in a thread is for all requests
that came since the one before it began (group commit), so it costs each of them up to two, and the disk the same
however many there are. Where one fails, all that waited for it get 503, and the next records go to a new segment: a
kernel may forget what it could not write, so a second try would prove nothing.

A replica that is not asked any more lets go of its segment when that is old, so that it can be compacted.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cluster.records import MAX_AGE_S, Record, SegmentWriter
from cluster.security.keys.store import KeyStore
from cluster.settings import Durability
from serve_apps.replica.http import LOG, Unavailable

T = TypeVar("T")


class RecordLog:
    """Used from one event loop, that of the replica's requests.

    Args:
        folder, store, key: as `SegmentWriter` takes them.
        durability: what an answer stands for.
        max_age_s: of a segment.

    Raises:
        KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
        Unavailable: the disk is full or failed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        store: KeyStore,
        key: str,
        durability: Durability,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._on_disk = durability is Durability.disk
        self._max_age_s = max_age_s
        self._timer: asyncio.TimerHandle | None = None
        try:
            self._writer = SegmentWriter(
                folder, store=store, key=key, keep_unsynced=self._on_disk, max_age_s=max_age_s
            )
        except OSError as error:
            raise _unavailable(error) from error
        self._waiting: list[asyncio.Future[None]] = []
        self._syncing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "records")

    def append(self, *records: Record) -> None:
        """Write records, all or none.

        Raises:
            Unavailable: the disk is full or failed; later ones may go well.
        """
        try:
            self._writer.append(*records)
        except OSError as error:
            raise _unavailable(error) from error

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._max_age_s, self._leave_if_old)

    def _leave_if_old(self) -> None:
        self._look_later()
        if not self._waiting and self._syncing is None:
            with contextlib.suppress(
                OSError
            ):  # the records that this concerns have been answered for already
                self._writer.leave_if_old()

    async def settled(self, answer: T) -> T:
        """An answer, once all that was appended before is as durable as it is to be.

        Raises:
            Unavailable: the disk failed; the answer must not be given.
        """
        if self._timer is None:
            self._look_later()
        if self._on_disk:
            await self._synced()
        return answer

    async def _synced(self) -> None:
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync_groups())
        await mine

    async def _sync_groups(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                await loop.run_in_executor(self._thread, self._writer.sync)
            except Exception as error:  # noqa: BLE001 (whatever it was, who waits must hear of it)
                LOG.error("records could not be brought to the disk", exc_info=error)
                failed = _unavailable(error)
                # Those that came meanwhile may have been written to the same file, so they are refused as well.
                group, self._waiting = [*group, *self._waiting], []
                for one in group:
                    if not one.done():
                        one.set_exception(failed)
            else:
                for one in group:
                    if not one.done():  # its client may have gone
                        one.set_result(None)
        self._syncing = None

    def close(self) -> None:
        """Let go of the segment."""
        if self._timer is not None:
            self._timer.cancel()
        self._thread.shutdown()
        self._writer.close()


def _unavailable(error: Exception) -> Unavailable:
    # Without the path, which clients would see.
    why = error.strerror if isinstance(error, OSError) else "the log failed"
    return Unavailable(f"It cannot be written down, so it is not answered: {why}. Try again later.")
