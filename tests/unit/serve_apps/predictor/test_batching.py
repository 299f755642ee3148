"""Joined requests: each gets the answer that it would get alone, and none waits needlessly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.runtime import InputSpec, Model, ModelSignature, Precision, Predictions, Task
from cluster.runtime.encoding import Matrix
from cluster.settings import BatchingConfig
from serve_apps.predictor import batching
from serve_apps.predictor.batching import Batches, saves_time
from tests.servers.replica import running_replica

SIGNATURE = ModelSignature(task=Task.regression, inputs=(InputSpec(name="a", dtype="double"),), label="y")
BAD = 666.0


class DoublingModel:
    """A model that doubles its input, records the rows of each call, and fails on one value."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, matrix: Matrix) -> Predictions:
        self.calls.append(len(matrix))
        if (matrix == BAD).any():
            raise ValueError("666")
        return Predictions(signature=SIGNATURE, scores=matrix[:, 0].astype(np.float64) * 2)


def rows(*values: float) -> Matrix:
    return np.array(values, dtype=np.float32).reshape(-1, 1)


async def ask_all(batches: Batches, requests: list[list[float]]) -> list[Any]:
    """All at once; an error in the place of an answer."""
    pending = (batches.predict(rows(*values)) for values in requests)
    answers = await asyncio.gather(*pending, return_exceptions=True)
    return [one if isinstance(one, BaseException) else one.scores.tolist() for one in answers]


def run(of: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(of())


values = st.lists(st.floats(-1000, 1000, width=32).filter(lambda one: one != BAD), max_size=5)


@given(st.lists(values, max_size=12), st.integers(1, 20), st.sampled_from([0.0, 0.001]))
def test_joined_answers_equal_separate_answers(
    requests: list[list[float]], max_rows: int, max_wait_s: float
) -> None:
    """For any mix of sizes, including no rows; a call is larger than allowed only for a single request."""
    model = DoublingModel()
    batches = Batches(model, max_rows=max_rows, max_wait_s=max_wait_s)
    answers = run(lambda: ask_all(batches, requests))
    assert answers == [[2 * float(np.float32(one)) for one in request] for request in requests]
    assert all(called <= max_rows or called in map(len, requests) for called in model.calls)


def test_concurrent_requests_are_one_call() -> None:
    """A single request is a call of its own."""
    model = DoublingModel()
    batches = Batches(model, max_rows=64, max_wait_s=0)
    run(lambda: ask_all(batches, [[1.0], [2.0, 3.0], [4.0]]))
    run(lambda: ask_all(batches, [[1.0]]))
    assert model.calls == [4, 1]


def test_error_fails_only_its_own_request() -> None:
    """The other requests of the batch are answered."""
    batches = Batches(DoublingModel(), max_rows=64, max_wait_s=0)
    one, bad, other = run(lambda: ask_all(batches, [[1.0], [BAD], [2.0]]))
    assert (one, other) == ([2.0], [4.0])
    assert isinstance(bad, ValueError)


def test_cancelled_request_is_left_out() -> None:
    """The other requests of the batch are answered."""
    model = DoublingModel()
    batches = Batches(model, max_rows=64, max_wait_s=0)

    async def story() -> list[float]:
        gone = asyncio.ensure_future(batches.predict(rows(1.0)))
        stays = asyncio.ensure_future(batches.predict(rows(2.0)))
        await asyncio.sleep(0)
        gone.cancel()
        return list((await stays).scores)

    assert run(story) == [4.0]
    assert model.calls == [1]


def test_wait_ends_with_as_many_requests_as_last_time() -> None:
    """A single request does not wait."""
    model = DoublingModel()

    async def story() -> None:
        batches = Batches(model, max_rows=64, max_wait_s=3600)
        for requests in ([[1.0]], [[1.0], [2.0]], [[1.0], [2.0]], [[1.0], [2.0], [3.0]]):
            await asyncio.wait_for(ask_all(batches, requests), timeout=20)

    run(story)
    assert model.calls == [1, 2, 2, 3]


def test_wait_ends_after_the_maximum_time() -> None:
    """A batch waits only once: the next request does not wait again."""
    model = DoublingModel()

    async def story() -> None:
        batches = Batches(model, max_rows=64, max_wait_s=0.05)
        for requests in ([[1.0], [2.0]], [[1.0]], [[2.0]]):
            await asyncio.wait_for(ask_all(batches, requests), timeout=20)

    run(story)
    assert model.calls == [2, 1, 1]


@pytest.mark.parametrize(
    ("one_us", "eight_us", "expected"),
    [(100, 200, True), (100, 700, False), (14, 15, False), (80, 100, True), (5000, 9000, True)],
)
def test_batching_saves_time_if_the_cost_of_a_call_dominates(
    one_us: float, eight_us: float, expected: bool
) -> None:
    """It saves no time if a row takes as long as a call, or if calls are fast."""
    now = 0.0

    def model(matrix: Matrix) -> Predictions:
        nonlocal now
        now += {1: one_us, 8: eight_us}[len(matrix)] / 1e6
        return Predictions(signature=SIGNATURE, scores=np.zeros(len(matrix)))

    assert saves_time(model, 1, clock=lambda: now) is expected


@pytest.mark.parametrize(("precision", "joins"), [(Precision.float32, True), (Precision.int8, False)])
def test_int8_requests_are_never_joined(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, joins: bool
) -> None:
    """An answer must not depend on other requests."""
    monkeypatch.setattr(batching, "saves_time", lambda predict, num_inputs: True)
    model = SimpleNamespace(signature=replace(SIGNATURE, precision=precision), predict_matrix=DoublingModel())
    assert (batching.batches(cast(Model, model), BatchingConfig()) is not None) == joins


def test_replica_joins_requests_and_logs_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that cannot be encoded fails alone."""
    monkeypatch.setattr(batching, "MIN_SAVED_S", -1.0)
    monkeypatch.setattr(batching, "PROBE_ROWS", 1_000)
    with running_replica(tmp_path, SIGNATURE, batching=BatchingConfig(max_rows=8)) as replica:
        token = replica.token()

        def ask(number: int) -> tuple[int, dict[str, Any]]:
            value = "text" if number == 7 else float(number)
            body = {"entities": [{"id": number}], "features": {"a": value}}
            return replica.json("/v1/models/m:predict", body, token=token)

        alone = {number: ask(number)[1] for number in range(7)}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(24)))
        log = {row["prediction_id"]: row["a"] for row in replica.log().to_dicts()}
    assert [status for status, _ in answers] == [400 if number == 7 else 200 for number in range(24)]
    assert len(log) == 7 + 23
    for number, (status, content) in enumerate(answers):
        if status == 200:
            assert log[content["prediction_id"]] == float(number)
    for number, content in alone.items():
        assert answers[number][1]["predictions"][0]["value"] == pytest.approx(
            content["predictions"][0]["value"]
        )


@pytest.mark.parametrize("wrong", [{"max_rows": 0}, {"max_wait_ms": -1}, {"max_wait_ms": 5000}])
def test_invalid_batching_limits_are_refused(wrong: dict[str, Any]) -> None:
    """The message names the field."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BatchingConfig(**wrong)
