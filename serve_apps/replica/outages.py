"""Wait for a database that does not answer for a moment, for example because it is being restarted.

A request that fails at once would be an error for the client, although the database is back seconds later.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from cluster.errors import OnlineStoreUnavailable
from serve_apps.replica.http import OutageOfDatabase

T = TypeVar("T")

OUTAGE_S = 9.0
"""How long a request waits for a database. Many clients wait ten seconds for an answer."""
PAUSE_S = 0.2
_OUTAGES = (OnlineStoreUnavailable, OutageOfDatabase, DBAPIError)


async def outlast(call: Callable[[], Awaitable[T]], *, longest_s: float = OUTAGE_S) -> T:
    """Return the result of a call. While a database does not answer, call again.

    Args:
        call: may be repeated without harm.
        longest_s: seconds after which no further call begins.

    Raises:
        OnlineStoreUnavailable, OutageOfDatabase, DBAPIError: the database did not answer in time.
    """
    deadline = time.monotonic() + longest_s
    while True:
        try:
            return await call()
        except _OUTAGES:
            if time.monotonic() + PAUSE_S > deadline:
                raise
        await asyncio.sleep(PAUSE_S)
