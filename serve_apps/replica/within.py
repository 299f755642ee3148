"""A bound on how long something may take that mostly is there already.

Setting a timer and taking it away again takes as long as reading a request whose body came with its head, which is how
nearly all come. So the first step is made without one, and a timer is set only where that step has to wait.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


async def within(limit_s: float, work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine that was not begun yet gives.

    Raises:
        TimeoutError: it did not end in time; it was cancelled.
    """
    try:
        awaited = work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    async with asyncio.timeout(limit_s):
        return await _go_on(work, awaited)


@types.coroutine
def _go_on(work: Coroutine[Any, Any, T], awaited: Any) -> Generator[Any, Any, T]:
    """`await` for a coroutine that was begun and waits for something (PEP 380 spells out what it does)."""
    while True:
        try:
            try:
                said = yield awaited
            except BaseException as error:  # noqa: BLE001 (a cancellation above all: it is the coroutine's)
                awaited = work.throw(error)
            else:
                awaited = work.send(said)
        except StopIteration as done:
            result: T = done.value
            return result
