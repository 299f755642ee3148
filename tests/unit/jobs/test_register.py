"""Registration of graphs that scikit-learn exported by default, and refusals that name the tensor."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pyarrow as pa
import pytest
import skl2onnx
from onnx import TensorProto, helper
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.compose import make_column_transformer
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from cluster.errors import RefusedError, TrainingSetError
from cluster.runtime import Model, Task, open_model
from jobs.register import __main__ as command
from jobs.register.__main__ import PreparedModel, prepare
from jobs.register.artifact import Artifact, read_artifact
from jobs.register.config import RegisterConfig
from jobs.train.data import TrainingSet

ROWS = 400


def frame() -> pd.DataFrame:
    """Return rows with numbers, whole numbers and texts."""
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "age": draw.uniform(18, 90, ROWS),
            "children": draw.integers(0, 5, ROWS),
            "town": draw.choice(["abu dhabi", "dubai", "al ain"], ROWS),
            "job": draw.choice(["clerk", "smith"], ROWS),
        }
    )


def labels(data: pd.DataFrame) -> np.ndarray:
    return (data["age"] + 10 * data["children"] + 20 * (data["town"] == "dubai") > 75).to_numpy(np.int64)


def numbers(data: pd.DataFrame) -> np.ndarray:
    return data[["age", "children"]].to_numpy(np.float32)


def mixed_pipeline(model: Any, data: pd.DataFrame, target: Any) -> Any:
    columns = make_column_transformer(
        (StandardScaler(), ["age", "children"]), (OneHotEncoder(handle_unknown="ignore"), ["town", "job"])
    )
    return make_pipeline(columns, model).fit(data, target)


def export(model: Any, sample: Any, **options: Any) -> bytes:
    """Return the default export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data: bytes = skl2onnx.to_onnx(model, sample, **options).SerializeToString()
    return data


def source(**columns: Any) -> TrainingSet:
    data = frame()
    table = {name: data[name].tolist() for name in data} | {"y": labels(data).tolist()} | columns
    return TrainingSet(table=pa.table(table), manifest={}, hash="h")


def config(**changes: Any) -> RegisterConfig:
    values = {"name": "m", "artifact": "model.onnx", "reference": "r.parquet", "label": "y"}
    return RegisterConfig(**(values | changes))


def artifact(data: bytes, *, scores: str | None = None) -> Artifact:
    return read_artifact(data, path="model.onnx", scores=scores)


def register(
    folder: Path, data: bytes, rows: TrainingSet | None = None, **changes: Any
) -> tuple[PreparedModel, Model]:
    """Prepare the model's files as the command does, and load them as a replica does."""
    rows = rows or source()
    prepared = prepare(config(**changes), artifact(data), rows, folder)
    return prepared, open_model(folder)


def probabilities(pipeline: Any, data: Any) -> np.ndarray:
    return np.asarray(pipeline.predict_proba(data)[:, 1])


def test_a_default_export_with_text_columns_is_registered(tmp_path: Path) -> None:
    """One input per column, whole numbers, texts, ZipMap. The scores are those of scikit-learn, also for new texts."""
    data = frame()
    pipeline = mixed_pipeline(LogisticRegression(), data, labels(data))
    prepared, model = register(tmp_path, export(pipeline, data[:1]))
    assert model.signature.columns == ["age", "children", "town", "job"]
    assert model.signature.classes == (0, 1)
    assert prepared.metrics["auc"] > 0.95
    assert prepared.metrics["parity"]["largest_score_difference"] < 1e-5
    scores = model.predict(source().table).scores
    assert np.allclose(scores, probabilities(pipeline, data), atol=1e-5)
    row = {"age": [40.0], "children": [2], "town": ["fujairah"], "job": ["smith"]}
    assert model.predict(row).scores == pytest.approx(probabilities(pipeline, pd.DataFrame(row)), abs=1e-5)
    graph = onnx.load(tmp_path / "model.onnx")
    assert [one.name for one in graph.graph.input] == ["inputs"]
    assert [one.name for one in graph.graph.output] == ["scores"]


def test_missing_values_get_typical_values_with_a_warning(tmp_path: Path) -> None:
    """A logistic regression of scikit-learn gives no score for a missing number. The warning names the values."""
    data = frame()
    pipeline = mixed_pipeline(LogisticRegression(), data, labels(data))
    prepared, model = register(tmp_path, export(pipeline, data[:1]))
    typical = {
        "age": [float(np.quantile(data["age"].astype(np.float32), 0.5, method="lower"))],
        "children": [2],
        "town": ["unknown"],
        "job": ["unknown"],
    }
    assert "children = 2" in prepared.warnings[0]
    assert "town" not in prepared.warnings[0]  # the encoder ignores a text that it does not know
    filled = model.predict({name: [None] for name in typical}).scores
    assert filled == pytest.approx(model.predict(typical).scores)


def test_a_model_that_takes_missing_values_keeps_them(tmp_path: Path) -> None:
    """Trees of scikit-learn take them, so they are not replaced.

    skl2onnx 1.20 exports these trees wrongly for missing values. `expected`, the scores of the original, finds it.
    """
    data = frame()
    matrix = numbers(data)
    matrix[::3, 0] = np.nan
    forest = RandomForestClassifier(5, random_state=0).fit(matrix, labels(data))
    ages = [None if np.isnan(value) else float(value) for value in matrix[:, 0]]
    prepared, model = register(
        tmp_path, export(forest, matrix[:1]), source(age=ages), inputs=["age", "children"]
    )
    assert len(prepared.warnings) == 1
    assert "may have seen" in prepared.warnings[0]
    scores = probabilities(forest, matrix)
    with pytest.raises(RefusedError, match="differ from the original"):
        register(
            tmp_path,
            export(forest, matrix[:1]),
            source(age=ages, score=scores.tolist()),
            inputs=["age", "children"],
            expected="score",
        )
    complete = {"age": [40.0, 70.0], "children": [3, 0]}
    expected = probabilities(forest, np.array([[40, 3], [70, 0]], np.float32))
    assert model.predict(complete).scores == pytest.approx(expected)


@pytest.mark.parametrize("zipmap", [True, False, "columns"])
def test_text_classes_and_any_input_name(tmp_path: Path, zipmap: bool | str) -> None:
    """One matrix with any name. The classes come from the graph. One output per class is refused."""
    data = frame()
    target = np.where(labels(data) == 1, "yes", "no")
    forest = RandomForestClassifier(5, random_state=0).fit(numbers(data), target)
    exported = export(
        forest,
        None,
        initial_types=[("any name", FloatTensorType([None, 2]))],
        options={"zipmap": zipmap},
    )
    if zipmap == "columns":
        with pytest.raises(RefusedError, match="several outputs of numbers"):
            artifact(exported)
        return
    _, model = register(tmp_path, exported, source(y=target.tolist()), inputs=["age", "children"])
    assert model.signature.classes == ("no", "yes")
    assert np.allclose(model.predict(source().table).scores, probabilities(forest, numbers(data)), atol=1e-6)


def test_several_classes_and_a_regression(tmp_path: Path) -> None:
    """Both tasks give the scores of scikit-learn."""
    data = frame()
    three = np.digitize(data["age"], [40, 65])
    forest = RandomForestClassifier(5, random_state=0).fit(numbers(data), three)
    (tmp_path / "a").mkdir()
    _, model = register(
        tmp_path / "a",
        export(forest, numbers(data)[:1]),
        source(y=three.tolist()),
        inputs=["age", "children"],
        task=Task.multiclass,
    )
    assert np.allclose(model.predict(source().table).scores, forest.predict_proba(numbers(data)), atol=1e-6)
    (tmp_path / "b").mkdir()
    pipeline = mixed_pipeline(GradientBoostingRegressor(n_estimators=5), data, data["age"] * 100)
    _, model = register(
        tmp_path / "b",
        export(pipeline, data[:1]),
        source(y=(data["age"] * 100).tolist()),
        task=Task.regression,
    )
    assert np.allclose(model.predict(source().table).scores, pipeline.predict(data), rtol=1e-4)


def test_a_matrix_of_texts(tmp_path: Path) -> None:
    """All columns are texts, in one input."""
    data = frame()[["town", "job"]]
    pipeline = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(
        data.to_numpy(), labels(frame())
    )
    exported = export(pipeline, None, initial_types=[("texts", StringTensorType([None, 2]))])
    _, model = register(tmp_path, exported, inputs=["town", "job"])
    assert np.allclose(
        model.predict(source().table).scores, probabilities(pipeline, data.to_numpy()), atol=1e-6
    )


def test_columns_of_feature_views_are_found(tmp_path: Path) -> None:
    """An input `age` takes the only column `<view>__age`. Another name is given by `columns`."""
    data = frame()
    pipeline = mixed_pipeline(LogisticRegression(), data, labels(data))
    rows = source()
    names = {"age": "person__age", "children": "person__children", "town": "home", "job": "person__job"}
    renamed = TrainingSet(
        table=rows.table.rename_columns([names.get(name, name) for name in rows.table.column_names]),
        manifest={},
        hash="h",
    )
    exported = export(pipeline, data[:1])
    with pytest.raises(TrainingSetError, match=r"no column 'town'.*columns\.town="):
        register(tmp_path, exported, renamed)
    _, model = register(tmp_path, exported, renamed, columns={"town": "home"})
    assert model.signature.columns == ["person__age", "person__children", "home", "person__job"]


def test_a_graph_whose_scores_would_change_is_refused(tmp_path: Path) -> None:
    """Whole numbers beyond 2^24 are not exact in the platform's matrix, so this model would give other scores."""
    big = 2**26 + np.arange(ROWS)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(big[:, None], np.arange(ROWS) % 2)
    model[-1].coef_[:] = 1000.0
    exported = export(model, big[:1, None].astype(np.float64))
    with pytest.raises(RefusedError, match="differ from the original by up to"):
        register(
            tmp_path, exported, source(age=big.tolist(), y=(np.arange(ROWS) % 2).tolist()), inputs=["age"]
        )


def graph(inputs: list[Any], outputs: list[Any], nodes: list[Any] | None = None) -> bytes:
    """Return a hand-made graph."""
    nodes = nodes or [helper.make_node("Identity", [inputs[0].name], [outputs[0].name])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    data: bytes = model.SerializeToString()
    return data


def tensor(name: str, dtype: int = TensorProto.FLOAT, shape: Any = ("rows", 2)) -> Any:
    return helper.make_tensor_value_info(name, dtype, list(shape))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"nonsense", "no ONNX graph"),
        (
            graph([tensor("image", shape=(1, 3, 8))], [tensor("o", shape=(1, 3, 8))]),
            "'image' with 3 dimensions",
        ),
        (
            graph([tensor("half", TensorProto.FLOAT16)], [tensor("o", TensorProto.FLOAT16)]),
            "'half' as tensor\\(float16\\)",
        ),
        (graph([tensor("a"), tensor("b")], [tensor("o")]), "'a' has 2 columns"),
        (
            graph([tensor("a", TensorProto.INT64)], [tensor("label", TensorProto.INT64)]),
            "'label', none with scores",
        ),
        (
            graph(
                [tensor("a")],
                [tensor("p"), tensor("q")],
                [helper.make_node("Identity", ["a"], ["p"]), helper.make_node("Neg", ["a"], ["q"])],
            ),
            "several outputs of numbers: 'p', 'q'",
        ),
    ],
)
def test_other_graphs_are_refused(data: bytes, message: str) -> None:
    """The message names the tensor."""
    with pytest.raises(RefusedError, match=message):
        artifact(data)


def test_scores_selects_an_output() -> None:
    """An unknown output is refused."""
    nodes = [helper.make_node("Identity", ["a"], ["p"]), helper.make_node("Neg", ["a"], ["q"])]
    data = graph([tensor("a")], [tensor("p"), tensor("q")], nodes)
    assert artifact(data, scores="q").output == "q/float"
    with pytest.raises(RefusedError, match="no output 'r', but 'p', 'q'"):
        artifact(data, scores="r")


def test_tensors_in_other_files_are_refused() -> None:
    """A graph must not read files of the machine."""
    model = onnx.load_from_string(graph([tensor("a")], [tensor("o")]))
    outside = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    outside.data_location = TensorProto.EXTERNAL
    model.graph.initializer.append(outside)
    with pytest.raises(RefusedError, match="tensor 'w' in another file"):
        artifact(model.SerializeToString())


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        ({}, {"inputs": ["age"]}, "'X' has 2 columns, and the reference has 1"),
        ({}, {"inputs": ["age", "town"]}, "'X' as tensor\\(float\\), and column 'town'"),
        ({}, {"inputs": ["age", "agee"]}, "Did you mean 'age'"),
        ({"y": ["maybe"] * ROWS}, {"inputs": ["age", "children"]}, "only knows 0, 1"),
        (
            {},
            {"inputs": ["age", "children"], "task": Task.regression},
            "do not fit task=regression|scores of shape",
        ),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(
    tmp_path: Path, columns: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """The message names the column or the tensor."""
    data = frame()
    forest = RandomForestClassifier(3, random_state=0).fit(numbers(data), labels(data))
    with pytest.raises((TrainingSetError, RefusedError), match=message):
        register(tmp_path, export(forest, numbers(data)[:1]), source(**columns), **changes)


def test_logits_are_refused(tmp_path: Path) -> None:
    """A linear model's values are no probabilities."""
    data = frame()
    ridge = Ridge().fit(numbers(data), data["age"])
    with pytest.raises(RefusedError, match="not probabilities"):
        register(tmp_path, export(ridge, numbers(data)[:1]), inputs=["age", "children"])


def test_another_format_is_refused() -> None:
    """A pickle could run code."""
    with pytest.raises(RefusedError, match="no ONNX file"):
        command.read_file(config(artifact="model.pkl"))
