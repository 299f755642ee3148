"""Tests of ONNX graphs of other tools: they run where that is safe, else the message names tensor and fix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from cluster.errors import RefusedError
from cluster.runtime import InputSpec, Model, ModelSignature, Predictions, Task
from cluster.runtime.onnx_engine import OnnxEngine
from cluster.runtime.predictions import check_scores

INPUTS = tuple(InputSpec(name=name, dtype="double") for name in ("a", "b"))
ROWS = np.array([[1, 2], [3, 4], [np.nan, 6]], np.float32)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A linear model as other tools export it, correct or with a fault."""

    dtype: int = TensorProto.FLOAT
    rows: int | str | None = "rows"
    columns: int | str = 2
    input_name: str = "inputs"
    output_name: str = "scores"
    outputs: int = 1
    last: str = "Sigmoid"
    imputes: bool = True
    more: list[str] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        nodes = [
            helper.make_node("IsNaN", [self.input_name], ["missing"]),
            helper.make_node("Where", ["missing", "zero", self.input_name], ["filled"]),
            helper.make_node("MatMul", ["filled" if self.imputes else self.input_name, "weights"], ["sums"]),
            helper.make_node(self.last, ["sums"], [self.output_name]),
        ]
        weights = np.arange(1, 1 + 2 * self.outputs) / 10
        graph = helper.make_graph(
            nodes,
            "linear",
            [helper.make_tensor_value_info(self.input_name, self.dtype, [self.rows, self.columns])],
            [helper.make_tensor_value_info(self.output_name, self.dtype, [self.rows, self.outputs])],
            [
                helper.make_tensor("weights", self.dtype, [2, self.outputs], weights),
                helper.make_tensor("zero", self.dtype, [1], [0.0]),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        data: bytes = model.SerializeToString()
        return data


def model(graph: Graph, task: Task = Task.binary, classes: Any = ("no", "yes")) -> Model:
    signature = ModelSignature(task=task, inputs=INPUTS, label="y", classes=classes)
    return Model(signature, OnnxEngine(graph.to_bytes()))


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.DOUBLE])
@pytest.mark.parametrize("rows", ["rows", None, 1, 2, 3, 5])
def test_float64_and_fixed_batch_give_the_scores_of_a_plain_graph(dtype: int, rows: Any) -> None:
    """The matrix is cast, and a fixed batch is padded. One row and many rows give the same scores."""
    expected = 1 / (1 + np.exp(-np.nan_to_num(ROWS) @ [[0.1], [0.2]])).ravel()
    served_model = model(Graph(dtype=dtype, rows=rows))
    assert served_model.predict_matrix(ROWS).scores == pytest.approx(expected, abs=1e-6)
    assert served_model.predict_matrix(ROWS[:1]).scores == pytest.approx(expected[:1], abs=1e-6)


def test_binary_graph_with_two_probabilities_gives_the_second() -> None:
    """scikit-learn's classifiers export both."""
    pair = Graph(outputs=2, last="Softmax")
    raw = OnnxEngine(pair.to_bytes()).scores(ROWS)
    assert np.array_equal(model(pair).predict_matrix(ROWS).scores, raw[:, 1])
    with pytest.raises(RefusedError, match=r"sum to 0.*Softmax"):
        model(Graph(outputs=2, last="Identity"))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (Graph(dtype=TensorProto.FLOAT16), r"takes 'inputs' as tensor\(float16\).*Cast"),
        (Graph(input_name="X"), r"has the inputs 'X'.*named 'inputs'"),
        (Graph(output_name="probabilities"), "outputs 'probabilities', but no 'scores'"),
        (Graph(columns="columns"), r"shape \['rows', 'columns'\].*number for the columns"),
        (Graph(imputes=False), r"gives nan for a row of missing values.*Where\(IsNaN"),
        (Graph(outputs=3), r"shape \(1, 3\).*one probability a row"),
    ],
)
def test_graph_that_violates_the_contract_is_refused_with_a_fix(graph: Graph, message: str) -> None:
    """The message is one line."""
    with pytest.raises(RefusedError, match=message) as refused:
        model(graph)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"nothing at all"])
def test_invalid_bytes_are_refused(data: bytes) -> None:
    """No error of ONNX Runtime or protobuf is raised."""
    with pytest.raises(RefusedError, match=r"model\.onnx cannot be loaded"):
        OnnxEngine(data)


def test_graph_that_does_not_run_is_refused() -> None:
    """It declares any number of rows but works for one row only."""
    reshape = helper.make_graph(
        [helper.make_node("Reshape", ["inputs", "shape"], ["scores"])],
        "one row",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [1, 2])],
    )
    data = helper.make_model(reshape, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(RefusedError, match="must declare this number as the first dimension"):
        OnnxEngine(data.SerializeToString()).scores(ROWS)


@pytest.mark.parametrize(
    ("task", "scores", "message"),
    [
        (Task.binary, [0.2, 8.94], "outside 0 to 1 for 1 of 2.*Sigmoid"),
        (Task.binary, [0.2, np.nan], "not finite for 1 of 2"),
        (Task.multiclass, [[0.5, 0.5, 0.0], [0.9, 0.9, 0.9]], "do not sum to 1 for 1 of 2.*Softmax"),
        (Task.multiclass, [[1.5, -0.5, 0.0], [1.0, 0.0, 0.0]], "outside 0 to 1"),
        (Task.regression, [1.0, np.inf], "not finite"),
    ],
)
def test_invalid_scores_for_the_task_are_refused(task: Task, scores: Any, message: str) -> None:
    """For example, logits are refused if probabilities are expected."""
    with pytest.raises(RefusedError, match=message):
        check_scores(predictions(task, scores))


def test_valid_scores_are_accepted() -> None:
    """A sum may differ from one by rounding."""
    check_scores(predictions(Task.binary, [0.0, 1.0]))
    check_scores(predictions(Task.multiclass, [[0.3, 0.3, 0.4004]]))
    check_scores(predictions(Task.regression, [-1e30]))


def predictions(task: Task, scores: Any) -> Predictions:
    classes = {Task.binary: ("no", "yes"), Task.multiclass: ("a", "b", "c"), Task.regression: None}[task]
    signature = ModelSignature(task=task, inputs=INPUTS, label="y", classes=classes)
    return Predictions(signature=signature, scores=np.array(scores, np.float64))
