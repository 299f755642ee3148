"""Wait for a database that does not answer for some seconds, for example because it is being restarted.

Without waiting, clients would get errors. While a database does not answer, one probe of the replica repeats a call in
a thread, and requests wait for the probe. So requests do not block the event loop, and the replica answers health
checks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from cluster.errors import OnlineStoreUnavailable
from serve_apps.replica.http import OutageOfDatabase
from serve_apps.rollout.assignment import CHAMPION_VARIANT

T = TypeVar("T")

OUTAGE_S = 9.0
"""Seconds for which a request waits for databases. It is below ten seconds, a usual timeout of clients."""
TREATMENT_S = 6.0
"""The same for a version that is not the champion. After 7 s, the edge lets the champion answer instead. The arm does
not say this: after a promotion, the champion answers the units of the arm treatment."""
PAUSE_S = 0.2


def wait_s(variant: str) -> float:
    """Return how many seconds a request waits for databases, for the variant of the version that answers it."""
    return OUTAGE_S if variant == CHAMPION_VARIANT else TREATMENT_S


class Outages:
    """Repeats the calls of one replica's requests while a database does not answer.

    Only the event loop of the replica's requests may use it.
    """

    def __init__(self) -> None:
        self._probe: asyncio.Task[None] | None = None
        self._awaited_until = 0.0
        self._error: Exception = OutageOfDatabase()

    async def retry_during_outage(
        self, call: Callable[[], T], *, deadline: float | None = None, in_thread: bool = False
    ) -> T:
        """Return the result of a call. While a database does not answer, wait for it and call again.

        Args:
            call: may be repeated without harm, also in another thread.
            deadline: monotonic time until which to wait; None is `OUTAGE_S` from now.
            in_thread: whether the call is slow and must run in a thread, not in the event loop.

        Raises:
            OnlineStoreUnavailable, OutageOfDatabase, DBAPIError: the database did not answer in time.
        """
        deadline = time.monotonic() + OUTAGE_S if deadline is None else deadline
        while True:
            if self._probe is None:
                try:
                    return await asyncio.to_thread(call) if in_thread else call()
                except Exception as error:
                    if not is_outage(error):
                        raise
                    self._error = error
            await self._wait(call, deadline)

    async def _wait(self, call: Callable[[], object], deadline: float) -> None:
        """Wait until the database answers again. If there is no probe yet, this call becomes the probe."""
        self._awaited_until = max(self._awaited_until, deadline)
        if self._probe is None:
            self._probe = asyncio.create_task(self._run_probe(call))
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await asyncio.shield(self._probe)
        except TimeoutError:
            raise self._error from None

    async def _run_probe(self, call: Callable[[], object]) -> None:
        """Repeat a call until the database answers, or no request waits any more."""
        try:
            while time.monotonic() < self._awaited_until:
                await asyncio.sleep(PAUSE_S)
                try:
                    await asyncio.to_thread(call)
                    return
                except Exception as error:  # noqa: BLE001 (with any other error, the database has answered)
                    if not is_outage(error):
                        return
                    self._error = error
        finally:
            self._probe = None


def is_outage(error: BaseException | None) -> bool:
    """Return whether an error means that a database does not answer now, and not that it refused a statement."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
    return isinstance(error, OnlineStoreUnavailable | OutageOfDatabase | PoolTimeout)
