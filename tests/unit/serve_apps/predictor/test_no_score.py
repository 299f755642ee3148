"""A model without a finite score for a request: 503 from both endpoints, a log record and a metric."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from cluster.errors import ModelFailed, RefusedError
from cluster.records.reading import read_log
from cluster.runtime import InputSpec, ModelSignature, Predictions, Task
from cluster.runtime.model import Model
from cluster.runtime.signature import ONNX_FILE
from cluster.security.keys.access import key_store
from serve_apps.predictor.batching import Batches
from tests.samples.signatures import of_each_task
from tests.servers.replica import MODEL, Replica, running_replica, write_model

AGE = InputSpec(name="p__age", dtype="double")
SIGNATURES = of_each_task(AGE)
VALUE = SIGNATURES.regression
PREDICT, INFER = "/v1/models/m:predict", "/v2/models/m/infer"
SAID = "Model 'm' version 1 gave no finite score for 1 of 2 rows"


def write_root(folder: Path, signature: ModelSignature) -> None:
    """The model of `write_model` over the square root of its inputs, which is NaN for negative ones."""
    write_model(folder, signature)
    model = onnx.load(folder / ONNX_FILE)
    nodes = list(model.graph.node)
    place = next(number for number, node in enumerate(nodes) if node.op_type == "MatMul")
    nodes[place].input[0] = "root"
    nodes.insert(place, helper.make_node("Sqrt", ["present"], ["root"]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (folder / ONNX_FILE).write_bytes(onnx.ModelProto.SerializeToString(model))


@pytest.fixture(scope="module", params=SIGNATURES, ids=lambda one: one.task.value)
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with running_replica(tmp_path_factory.mktemp("replica"), request.param, write=write_root) as running:
        yield running


def body(endpoint: str, ages: list[float]) -> dict[str, Any]:
    """Build a request with one row for each age."""
    if endpoint == PREDICT:
        return {"entities": [{"id": number} for number in range(len(ages))], "features": {"p__age": ages}}
    return {"inputs": [{"name": "p__age", "datatype": "FP64", "shape": [len(ages)], "data": ages}]}


class FakeCounter:
    """Replaces Ray's counter, which needs a Ray process."""

    def __init__(self) -> None:
        self.count = 0

    def inc(self) -> None:
        self.count += 1


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("endpoint", [PREDICT, INFER])
def test_no_finite_score_is_503_with_a_record(
    replica: Replica, endpoint: str, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer names the model. The record has the reason and no prediction. The next request is answered."""
    predictor, counted = replica.predictor, FakeCounter()
    batches = Batches(predictor._model.predict_matrix, max_rows=64, max_wait_s=0) if batched else None
    monkeypatch.setattr(predictor, "_batches", batches)
    monkeypatch.setattr(predictor._metrics, "_without_score", counted)
    bodies = [body(endpoint, ages) for ages in ([4.0, -1.0], [4.0, 9.0])]
    status, headers, answer = replica.call(endpoint, bodies[0])
    assert (status, counted.count) == (503, 1)
    assert SAID in answer.decode()
    assert "label" not in answer.decode()
    assert "retry-after" not in headers
    log = read_log(Path(replica.places.predictions(MODEL)), key_store(replica.keys))
    mine = log.failures.filter(prediction_id=headers["x-falaj-prediction-id"])
    assert mine.select("row", "fault").rows() == [
        (row, "gave no finite score for 1 of 2 rows") for row in (0, 1)
    ]
    assert (
        log.answers.is_empty()
        or log.answers.filter(prediction_id=headers["x-falaj-prediction-id"]).is_empty()
    )
    assert replica.json(endpoint, bodies[1])[0] == 200
    assert counted.count == 1


@pytest.mark.parametrize("endpoint", [PREDICT, INFER])
def test_failing_model_is_503_with_a_record(
    replica: Replica, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's message is not sent, and a wrong request is still 400."""
    monkeypatch.setattr(replica.predictor._model, "_engine", FailingEngine())
    monkeypatch.setattr(replica.predictor, "_batches", None)
    counted = FakeCounter()
    monkeypatch.setattr(replica.predictor._metrics, "_without_score", counted)
    status, headers, answer = replica.call(endpoint, body(endpoint, [1.0]))
    assert (status, counted.count) == (503, 1)
    assert b"version 1 does not run on this request" in answer
    assert b"secret" not in answer
    log = read_log(Path(replica.places.predictions(MODEL)), key_store(replica.keys))
    mine = log.failures.filter(prediction_id=headers["x-falaj-prediction-id"])
    assert mine["fault"].to_list() == ["does not run on this request"]
    assert (replica.json(endpoint, body(endpoint, [1e300]))[0], counted.count) == (400, 1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda one: one.task.value)
def test_non_finite_scores_of_any_engine_are_refused(signature: ModelSignature, wrong: float) -> None:
    """At any place of any row."""
    shape = (3, 3) if signature.task is Task.multiclass else (3,)
    good = Predictions(signature=signature, scores=np.full(shape, 0.25))
    assert good.require_finite() is good
    for place in range(good.scores.size):
        scores = good.scores.copy()
        scores.flat[place] = wrong
        with pytest.raises(ModelFailed, match="no finite score for 1 of 3 rows"):
            replace(good, scores=scores).require_finite()
    with pytest.raises(ModelFailed, match="1 of 1 rows"):
        Predictions(signature=signature, scores=np.full((1, *shape[1:]), wrong)).require_finite()


class FailingEngine:
    """An engine that always fails."""

    num_inputs = 1

    def scores(self, matrix: Any) -> Any:
        raise RefusedError("model.onnx does not run: secret")


class ShortEngine:
    """An engine that returns only the first row's scores."""

    num_inputs = 1

    def scores(self, matrix: Any) -> Any:
        return np.full(1, 0.5)


def test_scores_of_another_shape_are_refused() -> None:
    """One score for three rows would be given to three entities."""
    with pytest.raises(ModelFailed, match=r"shape \(1,\) for 3 rows"):
        Model(VALUE, ShortEngine()).predict({"p__age": [1.0, 2.0, 3.0]})


def test_only_the_request_without_a_score_fails_in_a_batch() -> None:
    """The other requests are answered."""

    def roots(matrix: Any) -> Predictions:
        with np.errstate(invalid="ignore"):
            return Predictions(signature=VALUE, scores=np.sqrt(matrix[:, 0].astype(float)))

    async def ask() -> list[Any]:
        batches = Batches(roots, max_rows=64, max_wait_s=0)
        pending = [batches.predict(np.array([[value]], dtype=np.float32)) for value in (4, -1, 9)]
        return await asyncio.gather(*pending)

    good, bad, other = asyncio.run(ask())
    assert [one.require_finite().rows() for one in (good, other)] == [[{"value": 2.0}], [{"value": 3.0}]]
    with pytest.raises(ModelFailed):
        bad.require_finite()
