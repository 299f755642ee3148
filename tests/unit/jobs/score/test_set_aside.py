"""Rows that cannot be scored are set aside with a reason. The others are scored."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cluster.errors import InvalidRequest, RefusedError
from cluster.ledger.events import ScoringFinished
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.runtime.signature import ONNX_FILE, ONNX_INPUT, ONNX_OUTPUT, SIGNATURE_FILE
from jobs.score.set_aside import Reasons, TooManyBadRows
from tests.projects.batch_scoring import ScoringProject

INPUTS = (InputSpec(name="age", dtype="double"), InputSpec(name="codes", dtype="float", length=2))
SIGNATURE = ModelSignature(task=Task.regression, inputs=INPUTS, label="y")


def write_square_root(folder: Path, signature: ModelSignature) -> None:
    """Write a model that gives the square root of the sum of its inputs: no number if the sum is negative."""
    nodes = [
        helper.make_node("IsNaN", [ONNX_INPUT], ["missing"]),
        helper.make_node("Where", ["missing", "zero", ONNX_INPUT], ["present"]),
        helper.make_node("ReduceSum", ["present", "axis"], ["sums"], keepdims=0),
        helper.make_node("Sqrt", ["sums"], [ONNX_OUTPUT]),
    ]
    graph = helper.make_graph(
        nodes,
        "root",
        [helper.make_tensor_value_info(ONNX_INPUT, TensorProto.FLOAT, ["n", signature.width])],
        [helper.make_tensor_value_info(ONNX_OUTPUT, TensorProto.FLOAT, ["n"])],
        [
            onnx.numpy_helper.from_array(np.float32(0), "zero"),
            onnx.numpy_helper.from_array(np.array([1], dtype=np.int64), "axis"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    folder.mkdir(parents=True)
    (folder / ONNX_FILE).write_bytes(model.SerializeToString())
    (folder / SIGNATURE_FILE).write_text(signature.to_json())


def test_only_bad_rows_are_set_aside(project: ScoringProject) -> None:
    """Three kinds of bad rows: a number that is too large, a list of another length, and no finite score."""
    project.register(SIGNATURE, write=write_square_root)
    age = [float(number) for number in range(100)]
    age[10], age[20] = 1e39, -1e6
    codes = [[1.0, 2.0]] * 100
    codes[30] = [1.0]
    project.write({"person_id": range(100), "age": age, "codes": pa.array(codes, pa.list_(pa.float32()))})
    finished = project.score(part_rows=40)
    assert (finished.rows, finished.scored) == (100, 97)
    assert finished.set_aside == {
        "Input 'age' is beyond what a float32 can hold (3.4e+38).": 1,
        "Input 'codes' must be lists of 2 numbers, some have more or fewer.": 1,
        "the model gave no finite score": 1,
    }
    scores, set_aside = project.scores(), project.set_aside()
    assert set(scores["input_row"]) == set(range(100)) - {10, 20, 30}
    expected = {row: math.sqrt(age[row] + 3) for row in scores["input_row"].to_list()}
    assert dict(zip(scores["input_row"], scores["value"], strict=True)) == pytest.approx(expected, rel=1e-6)
    assert set_aside["input_row"].to_list() == [10, 20, 30]
    assert set_aside["age"].to_list() == [1e39, -1e6, 30.0]
    assert set_aside["person_id"].to_list() == [10, 20, 30]


def test_text_of_another_form_is_set_aside(project: ScoringProject) -> None:
    """In CSV, where all values are text. The reason does not contain the value, but the file with the rows does."""
    project.register(
        ModelSignature(task=Task.regression, inputs=INPUTS[:1], label="y"), write=write_square_root
    )
    lines = [f"{number},{number}.5" for number in range(100)]
    lines[7], lines[8] = "7,secret", "8,"
    (project.root / "rows.csv").write_text("person_id,age\n" + "\n".join(lines))
    finished = project.score(input=str(project.root / "rows.csv"), part_rows=30)
    assert finished.set_aside == {"'age' is not float64": 1}
    assert project.set_aside().select("person_id", "age", "input_row").rows() == [("7", "secret", 7)]
    assert project.scores().filter(pl.col("input_row") == 8)["value"].to_list() == [0.0]
    assert project.scores()["input_row"].to_list() == [number for number in range(100) if number != 7]


def test_too_many_bad_rows_are_refused(project: ScoringProject) -> None:
    """The message has the most frequent reason and the setting. With a larger share, the same run continues."""
    project.register(SIGNATURE, write=write_square_root)
    project.write(
        {
            "age": [-1e6 if number < 10 else 1.0 for number in range(100)],
            "codes": pa.array([[1.0, 2.0]] * 100, pa.list_(pa.float32())),
        }
    )
    for part_rows, message in ((7, "The input has 10|One part"), (50, "One part of the input has 10")):
        with pytest.raises(RefusedError, match=message) as refused:
            project.score(part_rows=part_rows, output=f"by {part_rows}")
        assert "at most 5 may be set aside" in str(refused.value)
        assert "no finite score. Correct the rows, or set a larger max_bad_share" in str(refused.value)
        assert not list(project.ledger.entries(ScoringFinished))
    assert project.score(part_rows=50, output="by 50", max_bad_share=0.1).scored == 90


@given(bad=st.sets(st.integers(0, 199)), size=st.integers(0, 200))
def test_exactly_the_bad_rows_are_found(bad: set[int], size: int) -> None:
    """For any bad rows, and with few calls if few rows are bad."""
    reasons, calls = Reasons(size, 200), 0
    positions = np.arange(size)

    def attempt(start: int, stop: int) -> None:
        nonlocal calls
        calls += 1
        if bad & set(range(start, stop)):
            raise InvalidRequest("bad")

    reasons.reject_failing(positions, attempt, InvalidRequest)
    found = {row for row in bad if row < size}
    assert set(np.flatnonzero(~reasons.good).tolist()) == found
    assert dict(reasons.counts) == ({"bad": len(found)} if found else {})
    assert calls <= 1 + 2 * 8 * len(found)


def test_the_search_ends_at_the_limit() -> None:
    """A million bad rows cost no more calls than the limit allows."""
    reasons = Reasons(1_000_000, 3)

    def attempt(start: int, stop: int) -> None:
        raise InvalidRequest("bad")

    with pytest.raises(TooManyBadRows, match="4 rows that cannot be scored"):
        reasons.reject_failing(np.arange(1_000_000), attempt, InvalidRequest)
