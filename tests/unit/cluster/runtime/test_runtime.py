"""Tests of the runtime: the same rows give the same predictions in every format and task."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.errors import ArtifactTampered, InvalidRequest, RefusedError
from cluster.ledger import Ledger
from cluster.registry import Lineage, Registry
from cluster.runtime import (
    Encoder,
    InputSpec,
    ModelSignature,
    Task,
    encode,
    load_model,
    open_model,
    parse_signature,
)
from cluster.runtime.encoding import MIN_BATCH
from cluster.security.keys.keyring import Keyring
from cluster.storage import Layout

AGE = InputSpec(name="age", dtype="float64")
SEX = InputSpec(name="sex", dtype="string", categories=("f", "m"))


def signature(task: Task, classes: Any = None) -> ModelSignature:
    return ModelSignature(task=task, inputs=(AGE, SEX), label="y", classes=classes)


TASKS = [
    (signature(Task.binary, (0, 1)), {"objective": "binary"}, {"probability", "label"}),
    (
        signature(Task.multiclass, ("a", "b", "c")),
        {"objective": "multiclass", "num_class": 3},
        {"probabilities", "label"},
    ),
    (signature(Task.regression), {"objective": "regression"}, {"value"}),
]


def build(folder: Path, model_signature: ModelSignature, objective: dict[str, Any]) -> None:
    """Train a few trees and write a model folder."""
    draw = np.random.default_rng(0)
    matrix = np.column_stack([draw.uniform(0, 90, 300), draw.integers(0, 2, 300)]).astype(np.float32)
    target = (matrix[:, 0] // 31) if model_signature.task is not Task.binary else (matrix[:, 0] > 45)
    data = lightgbm.Dataset(matrix, target.astype(float), categorical_feature=[1])
    booster = lightgbm.train({**objective, "verbosity": -1, "num_threads": 1}, data, num_boost_round=5)
    folder.mkdir()
    (folder / "model.txt").write_text(booster.model_to_string())
    (folder / "model.json").write_text(model_signature.to_json())


@pytest.mark.parametrize(("model_signature", "objective", "keys"), TASKS)
def test_lists_and_arrow_give_the_same_predictions(
    tmp_path: Path, model_signature: ModelSignature, objective: dict[str, Any], keys: set[str]
) -> None:
    """Single rows, as in a request, and a table, as in an evaluation."""
    build(tmp_path / "m", model_signature, objective)
    model = open_model(tmp_path / "m")
    columns: dict[str, list[Any]] = {"age": [10.0, 50.0, None], "sex": ["f", None, "unknown"]}
    rows = model.predict(columns).rows()
    assert model.predict(pa.table(columns)).rows() == rows
    single = [
        model.predict({name: [values[i]] for name, values in columns.items()}).rows()[0] for i in range(3)
    ]
    assert single == rows
    assert set(rows[0]) == keys
    assert parse_signature(model_signature.to_json()) == model_signature


def test_nulls_and_unknown_categories_become_nan() -> None:
    matrix = encode(signature(Task.regression), {"age": [None, 2], "sex": ["m", "x"]})
    assert np.array_equal(matrix, np.array([[np.nan, 1], [2, np.nan]], np.float32), equal_nan=True)


@pytest.mark.parametrize(
    "columns", [{"age": ["old"], "sex": ["f"]}, {"age": [1.0]}, {"age": [1.0], "sex": ["f", "m"]}]
)
def test_input_that_cannot_be_encoded_is_named(columns: dict[str, list[Any]]) -> None:
    """Text for a number, a missing input, another length."""
    with pytest.raises(InvalidRequest, match=r"age|sex"):
        encode(signature(Task.regression), columns)


def test_a_tampered_model_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """It is loaded through the registry, as in a replica."""
    model_signature, objective, _ = TASKS[0]
    build(tmp_path / "m", model_signature, objective)
    registry = Registry(Ledger(f"sqlite:///{tmp_path}/ledger.db"), Layout(str(tmp_path)))
    keyring = Keyring.create(tmp_path / "keyring.json", b"k" * 32)
    details: dict[str, Any] = {"family": "f", "task": "binary", "lineage": Lineage(training_set_hash="")}
    version = registry.register(tmp_path / "m", name="m", metrics={}, store=keyring, actor="a", **details)
    assert load_model(version, keyring).signature == model_signature
    (Path(version.uri) / "model.txt").write_text("not a tree at all")
    with pytest.raises(ArtifactTampered, match=r"model\.txt"):
        load_model(version, keyring)


KINDS: list[st.SearchStrategy[Any]] = [
    st.booleans(),
    st.integers() | st.floats() | st.floats(width=32),
    st.floats(width=32) | st.integers(-3, 3),
    st.sampled_from(["f", "m", "x"]),
]
VALUES = st.sampled_from([*KINDS, st.one_of(KINDS)]).flatmap(
    lambda kind: st.lists(st.none() | kind, min_size=1, max_size=6, unique_by=repr)
)


@given(
    st.sampled_from(
        [AGE, SEX, InputSpec(name="n", dtype="int64", categories=(1, 2)), InputSpec(name="b", dtype="bool")]
    ),
    VALUES,
)
@example(SEX, ["f", None, "x"])
def test_long_list_is_encoded_like_single_values(spec: InputSpec, values: list[Any]) -> None:
    """Errors have the same message, too."""
    encoder = Encoder(ModelSignature(task=Task.regression, inputs=(spec,), label="y"))

    def encoded(values: list[Any]) -> Any:
        try:
            return encoder({spec.name: values}).ravel().tolist()
        except InvalidRequest as error:
            return str(error)

    singly = [encoded([value]) for value in values]
    refused = [result for result in singly if isinstance(result, str)]
    expected = refused[0] if refused else [value for (value,) in singly] * MIN_BATCH
    assert repr(encoded(values * MIN_BATCH)) == repr(expected)


@pytest.mark.parametrize("harm", ["no model", "garbage", "other inputs", "no signature"])
def test_invalid_model_files_are_refused(tmp_path: Path, harm: str) -> None:
    """The process does not crash."""
    model_signature, objective, _ = TASKS[0]
    folder = tmp_path / "m"
    build(folder, model_signature, objective)
    match harm:
        case "no model":
            (folder / "model.txt").unlink()
        case "garbage":
            (folder / "model.txt").write_text("tree\nversion=v4\n\nnonsense")
        case "other inputs":
            fewer = ModelSignature(task=Task.binary, inputs=(AGE,), label="y", classes=(0, 1))
            (folder / "model.json").write_text(fewer.to_json())
        case "no signature":
            (folder / "model.json").write_text("{}")
    with pytest.raises(RefusedError):
        open_model(folder)


@pytest.mark.parametrize(("model_signature", "objective", "keys"), TASKS, ids=[task.value for task in Task])
def test_single_row_gives_the_same_scores_as_a_batch(
    tmp_path: Path, model_signature: ModelSignature, objective: dict[str, Any], keys: set[str]
) -> None:
    """LightGBM has a separate function for single rows. Results are bit-identical, also with threads and missing
    values."""
    build(tmp_path / "m", model_signature, objective)
    model = open_model(tmp_path / "m")
    draw = np.random.default_rng(1)
    matrix = np.column_stack([draw.uniform(0, 90, 200), draw.integers(0, 2, 200)]).astype(np.float32)
    matrix[::7, 0] = matrix[::5, 1] = np.nan
    together = model.predict_matrix(matrix).scores
    with ThreadPoolExecutor(4) as threads:
        alone = list(threads.map(lambda row: model.predict_matrix(row).scores, np.split(matrix, len(matrix))))
    np.testing.assert_array_equal(np.concatenate(alone), together)


def test_list_input_becomes_columns_of_the_matrix(tmp_path: Path) -> None:
    """From lists, NumPy arrays and Arrow. A missing list is all NaN."""
    emb = InputSpec(name="emb", dtype="float", length=2)
    model_signature = ModelSignature(task=Task.regression, inputs=(emb, SEX, AGE), label="y")
    assert (model_signature.width, model_signature.categorical) == (4, [2])
    assert parse_signature(model_signature.to_json()) == model_signature
    expected = np.array([[0.5, 1.5, 1, 3], [np.nan, np.nan, 0, np.nan]], np.float32)
    rest = {"sex": ["m", "f"], "age": [3.0, None]}
    for lists in ([[0.5, 1.5], None], [np.array([0.5, 1.5], np.float32), None]):
        assert np.array_equal(encode(model_signature, {"emb": lists, **rest}), expected, equal_nan=True)
        [row, _] = lists
        single = encode(model_signature, {"emb": [row], "sex": ["m"], "age": [3.0]})
        assert np.array_equal(single, expected[:1])
    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2)):
        table = pa.table({"emb": pa.array([[0.5, 1.5], None], kind), **rest})
        assert np.array_equal(encode(model_signature, table), expected, equal_nan=True)
    for bad in ([0.5], [0.5, "a"], 0.5, [0.5, 1e39], [True, False]):
        with pytest.raises(InvalidRequest, match="'emb'"):
            encode(model_signature, {"emb": [bad], "sex": ["m"], "age": [3.0]})
    for column in (pa.array([[0.5]]), pa.array([["a", "b"]]), pa.array([0.5]), pa.array([[0.5, 1e39]])):
        with pytest.raises(InvalidRequest, match="'emb'"):
            encode(model_signature, pa.table({"emb": column, "sex": ["m"], "age": [3.0]}))
