"""Where the steps of a batch run: in this process while the batch is small, in Ray tasks once it is large.

Attaching to Ray and starting its workers takes seconds, which is longer than a small batch takes altogether. So Ray is
imported and attached to only when it is needed. The steps are the same plain functions in both places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from cluster.session import refusal_behind

Block = Any
"""A table of a batch, or an object reference to one; also what a step gave for it."""


class Work:
    """The place of one batch's steps.

    Args:
        limit: values (rows times columns) up to which the batch stays in this process.
        attach: makes this process a driver of the running cluster.
    """

    def __init__(self, limit: int, attach: Callable[[], object]) -> None:
        self._limit, self._attach = limit, attach
        self.in_tasks = False

    def expect(self, values: int, *, is_large: bool = False) -> None:
        """Go over to Ray tasks if a batch of so many values is large, or is so anyway; there is no way back."""
        if (is_large or values > self._limit) and not self.in_tasks:
            self._attach()
            self.in_tasks = True

    def put(self, table: pa.Table) -> Block:
        """A table as the steps take it."""
        if not self.in_tasks:
            return table
        import ray

        return ray.put(table)

    def run(self, step: Callable[..., Any], *arguments: Any, num_cpus: float = 1.0) -> Block:
        """Run a step, here or as a task; blocks among the arguments reach it as tables."""
        return _task(step, num_cpus).remote(*arguments) if self.in_tasks else step(*arguments)

    def get(self, results: Sequence[Block]) -> list[Any]:
        """What steps gave.

        Raises:
            RefusedError: as a step raised it, wherever it ran.
        """
        if not self.in_tasks:
            return list(results)
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(list(results))
        except RayError as error:
            raise refusal_behind(error) from error


@functools.cache
def _task(step: Callable[..., Any], num_cpus: float) -> Any:
    import ray

    return ray.remote(num_cpus=num_cpus)(step)
