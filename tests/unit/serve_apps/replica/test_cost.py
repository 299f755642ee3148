"""A request's CPU time is that of its own work, also if it waits, and in a batch its part."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from cluster.runtime import InputSpec, ModelSignature, Predictions, Task
from cluster.runtime.encoding import Matrix
from serve_apps.predictor.batching import Batches
from serve_apps.replica.cost import RequestCost

SIGNATURE = ModelSignature(task=Task.regression, inputs=(InputSpec(name="a", dtype="double"),), label="y")


def burn(seconds: float) -> None:
    """Use the CPU."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_only_work_is_cpu_time() -> None:
    """Work outside of the `with` block is another request's."""
    cost = RequestCost()
    with cost:
        burn(0.004)
    burn(0.02)
    assert 4 <= cost.cpu_ms < 20
    assert cost.took_ms >= 24


def test_requests_of_a_batch_share_its_cpu_time_by_rows() -> None:
    """A failing request of the batch is asked alone, so it costs the others nothing."""

    def slow(matrix: Matrix) -> Predictions:
        burn(0.008)
        return Predictions(signature=SIGNATURE, scores=matrix[:, 0].astype(np.float64))

    costs = [RequestCost(), RequestCost()]

    async def ask() -> None:
        batches = Batches(slow, max_rows=64, max_wait_s=0)
        sizes = (3, 1)
        await asyncio.gather(
            *(
                batches.predict(np.ones((size, 1), dtype=np.float32), cost=cost)
                for size, cost in zip(sizes, costs, strict=True)
            )
        )

    asyncio.run(ask())
    assert costs[0].cpu_ms == pytest.approx(3 * costs[1].cpu_ms, rel=0.01)
    assert costs[0].cpu_ms + costs[1].cpu_ms >= 8
