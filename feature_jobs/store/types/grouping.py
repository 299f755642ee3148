"""Group consecutive items, so that each group fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def consecutive_groups(
    items: Iterable[Item], *, size: Callable[[Item], int], limit: int
) -> Iterator[list[Item]]:
    """Yield groups of consecutive items whose sizes add up to at most `limit`, or one larger item."""
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + size(item) > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group
