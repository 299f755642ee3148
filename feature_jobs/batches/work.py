"""Run the steps of a batch: in this process while the batch is small, in Ray tasks if it is large.

Connecting to Ray and starting its workers takes seconds, which is longer than a small batch takes in total. So this
process imports Ray and connects to it only when necessary. The steps are the same plain functions in both cases.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pyarrow as pa

from cluster.errors import RefusedError
from cluster.placement import Selector, options
from cluster.session import refusal_behind

Block = Any
"""A table of a batch, or a Ray reference to such a table. A step's result also has this type."""


class Work:
    """Runs the steps of one batch, in this process or in Ray tasks.

    Args:
        limit: number of values (rows times columns) up to which the batch stays in this process.
        attach: function that connects this process to the running cluster as a Ray driver, and returns the nodes where
            its tasks may run.
    """

    def __init__(self, limit: int, attach: Callable[[], Selector]) -> None:
        self._limit, self._attach = limit, attach
        self.selector: Selector = {}
        """Labels of the nodes where tasks may run; known once `in_tasks` is set."""
        self.in_tasks = False

    def expect(self, values: int, *, is_large: bool = False) -> None:
        """Switch to Ray tasks if the batch has more values than the limit, or if `is_large`. It never switches back."""
        if (is_large or values > self._limit) and not self.in_tasks:
            self.selector = self._attach()
            self.in_tasks = True

    def put(self, table: pa.Table) -> Block:
        """Return a table as a block, for `run`."""
        if not self.in_tasks:
            return table
        import ray

        return ray.put(table)

    def run(self, step: Callable[..., Any], *arguments: Any, num_cpus: float = 1.0) -> Block:
        """Run a step in this process or as a Ray task. The step gets a table for each argument that is a block."""
        if not self.in_tasks:
            return step(*arguments)
        return _task(step, num_cpus).options(**options(self.selector)).remote(*arguments)

    def run_all(self, step: Callable[..., Any], calls: Iterable[Sequence[Any]]) -> Iterator[Any]:
        """Run a step that needs much memory once for each list of arguments, and yield the results in order.

        A Ray Data pipeline runs the steps of a large batch, at most one per core of the nodes at a time. Ray's own
        number of CPUs may be larger than the number of cores. An argument may be a block; results must be small.

        Raises:
            RefusedError: a step raised it, in this process or in a task. The other tasks are stopped, but one may end
                later than this call.
        """
        if not self.in_tasks:
            yield from (step(*arguments) for arguments in calls)
            return
        import ray
        from ray.exceptions import RayError

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.execution_options.label_selector = self.selector or None
        context.enable_progress_bars = False
        packed = pack_calls(calls)
        if not packed.calls:
            return
        count = len(packed.calls)
        rows = ray.data.from_items([{"call": call} for call in packed.calls], override_num_blocks=count)
        pool = ray.data.TaskPoolStrategy(size=min(self._num_cores(), count))
        run = _Step(step, packed.references).run
        mapped = rows.map_batches(run, batch_size=1, compute=pool)
        results = cast("Generator[dict[str, Any]]", iter(mapped.iter_rows()))
        try:
            for row in results:
                yield _result_of(row["result"])
        except RayError as error:
            raise refusal_behind(error) from error
        finally:
            results.close()  # stops the tasks now, and not when the error has been handled

    def _num_cores(self) -> int:
        """Return the number of cores of the nodes where tasks may run, if they are like this one."""
        import ray

        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        fit = [node for node in nodes if node["Alive"] and self.selector.items() <= node["Labels"].items()]
        return len(fit) * (os.cpu_count() or 1)

    def get(self, results: Sequence[Block]) -> list[Any]:
        """Return the results of steps.

        Raises:
            RefusedError: a step raised it, in this process or in a task.
        """
        if not self.in_tasks:
            return list(results)
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(list(results))
        except RayError as error:
            raise refusal_behind(error) from error


class PackedCalls(NamedTuple):
    """The arguments of some calls. Each call is one row, so a task reads only its own arguments."""

    calls: list[bytes]
    references: list[Any]
    """References to tables. Ray must see them, so they are not packed."""


class _Reference(NamedTuple):
    """Stands for a reference in packed arguments."""

    number: int


def pack_calls(calls: Iterable[Sequence[Any]]) -> PackedCalls:
    """Pack the arguments of some calls."""
    import ray
    from ray import cloudpickle

    references: dict[Any, int] = {}
    packed = [
        cloudpickle.dumps(  # type: ignore[no-untyped-call]
            [
                _Reference(references.setdefault(argument, len(references)))
                if isinstance(argument, ray.ObjectRef)
                else argument
                for argument in arguments
            ]
        )
        for arguments in calls
    ]
    return PackedCalls(packed, list(references))


@dataclass(frozen=True, slots=True)
class _Step:
    """The function that Ray Data's tasks call: it runs the step with the packed arguments of one row."""

    step: Callable[..., Any]
    references: list[Any]

    def run(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        import ray

        [call] = batch["call"]
        arguments = [
            ray.get(self.references[value.number]) if isinstance(value, _Reference) else value
            for value in pickle.loads(call)  # noqa: S301 (from our own driver)
        ]
        try:
            return {"result": [pickle.dumps(self.step(*arguments))]}
        except RefusedError as error:  # Ray Data would log it, and change its message
            return {"result": [pickle.dumps(error)]}


def _result_of(packed: bytes) -> Any:
    """Return a step's result, or raise its refusal."""
    result = pickle.loads(packed)  # noqa: S301 (from our own task)
    if isinstance(result, RefusedError):
        raise result
    return result


@functools.cache
def _task(step: Callable[..., Any], num_cpus: float) -> Any:
    import ray

    return ray.remote(num_cpus=num_cpus)(step)
