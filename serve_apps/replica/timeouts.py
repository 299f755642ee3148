"""A timeout for a result that is usually ready.

Setting and cancelling a timer takes as long as reading a request whose head and body arrive together, which is usual.
So the coroutine's first step runs without a timer, and a timer is set only if that step has to wait.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


async def with_timeout(timeout_s: float, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that has not started yet.

    Raises:
        TimeoutError: the coroutine did not end in time and was cancelled.
    """
    try:
        awaited = work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    async with asyncio.timeout(timeout_s):
        return await _resume(work, awaited)


@types.coroutine
def _resume(work: Coroutine[Any, Any, T], awaited: Any) -> Generator[Any, Any, T]:
    """Await a coroutine whose first step has already run. `await` itself cannot do that.

    Args:
        work: The coroutine.
        awaited: What its first step waits for.

    The steps are those of `yield from`, as PEP 380 defines it.
    """
    while True:
        try:
            try:
                value = yield awaited
            except BaseException as error:  # noqa: BLE001 (mostly a cancellation, which the coroutine must get)
                awaited = work.throw(error)
            else:
                awaited = work.send(value)
        except StopIteration as done:
            result: T = done.value
            return result
