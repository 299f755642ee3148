"""Training without a cluster: split, signature, target, metrics, and the export of the network."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow.fs import LocalFileSystem
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from cluster.errors import ConfigError, TrainingSetError
from cluster.ledger import Ledger
from cluster.runtime import Task
from cluster.runtime.onnx_engine import OnnxEngine
from cluster.runtime.tabular_network import TabularNetwork
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.encryption.run_files import RunFolder
from cluster.security.keys.keyring import Keyring
from cluster.storage import Layout
from feature_jobs.store.types.dtypes import DTYPES
from jobs.metrics import binary_metrics, roc_auc
from jobs.train.__main__ import model_with_best_parameters, why_on_this_node
from jobs.train.config import LearningConfig, SplitConfig, TrainConfig
from jobs.train.data import TrainingSet, prepare, read_training_set
from jobs.train.families import resolve_family
from jobs.train.network.engine import learning_rate
from jobs.train.network.protocol import network_signature
from jobs.train.tabular_network.export import export
from jobs.train.tabular_network.family import Parameters, network_shape
from jobs.train.training_data import prepare_rows

ROWS = 200


def source(**columns: Any) -> TrainingSet:
    """Return a training set without a manifest, with the given columns added or replaced."""
    base = {
        "person_id": list(range(ROWS)),
        "age": [float(n % 90) for n in range(ROWS)],
        "code": [str(n % 3) for n in range(ROWS)],
        "y": [n % 2 for n in range(ROWS)],
    }
    return TrainingSet(table=pa.table(base | columns), manifest={}, hash="h")


def config(**changes: Any) -> LearningConfig:
    return LearningConfig(**{"name": "m", "training_set": "t", "label": "y"} | changes)


def test_held_out_rows_are_never_used_for_fitting() -> None:
    """Rows with id % 4 == 3 are held out. The three parts do not overlap and cover all rows."""
    data = prepare(config(), source())
    assert np.array_equal(np.flatnonzero(data.held_out), np.arange(3, ROWS, 4))
    assert np.array_equal(data.fit.astype(int) + data.validation + data.held_out, np.ones(ROWS))


def test_categories_come_only_from_the_rows_to_fit_on() -> None:
    """A value that occurs only in held-out rows is unknown to the model."""
    codes = ["rare" if n % 4 == 3 else "usual" for n in range(ROWS)]
    data = prepare(config(), source(code=codes))
    spec = next(spec for spec in data.signature.inputs if spec.name == "code")
    assert spec.categories == ("usual",)
    assert data.signature.columns == ["age", "code"]


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        ({"label": "z"}, {}, "no label 'z'"),
        ({}, {"y": [None] + [1] * (ROWS - 1)}, "missing in 1"),
        ({}, {"y": list(range(ROWS))}, "two values"),
        ({"inputs": ["agee"]}, {}, "Did you mean 'age'"),
        ({"split": SplitConfig(column="none")}, {}, "split.column=null"),
        ({}, {"person_id": [4 * n for n in range(ROWS)]}, "no held-out rows"),
        ({"max_categories": 2}, {}, "3 categories"),
        ({"task": Task.regression}, {"y": ["a"] * ROWS}, "needs a number"),
    ],
)
def test_unusable_training_data_is_refused(
    changes: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    """The message names the column and what to do."""
    with pytest.raises(TrainingSetError, match=message):
        prepare(config(**changes), source(**columns))


def source_with_column(dtype: str, column: pa.Array) -> TrainingSet:
    """Return a training set with a manifest, which declares `dtype` for the column `x`."""
    dtypes = [("age", "float64"), ("x", dtype)]
    columns = [{"name": name, "dtype": declared, "categorical": False} for name, declared in dtypes]
    return TrainingSet(table=source(x=column).table, manifest={"columns": columns}, hash="h")


def test_a_list_of_fixed_length_becomes_one_input_per_position() -> None:
    """The length comes from the manifest, or without one from the column type."""
    lists = pa.array([[float(n), None if n == 5 else 1.0] for n in range(ROWS)])
    lists = pa.array(
        [None if None in values else values for values in lists.to_pylist()], pa.list_(pa.float32())
    )
    declared = source_with_column("list<float32, 2>", lists)
    for training_set in (declared, source(x=lists.cast(pa.list_(pa.float32(), 2)))):
        data = prepare(config(inputs=["age", "x"]), training_set)
        assert [(spec.name, spec.length) for spec in data.signature.inputs] == [("age", None), ("x", 2)]
        assert data.matrix[4].tolist() == [4.0, 4.0, 1.0]
        assert np.isnan(data.matrix[5]).tolist() == [False, True, True]
    signature = network_signature(prepare_rows(config(inputs=["age", "x"]), declared))
    assert (signature.numeric, signature.categorical) == ([0, 1, 2], [])


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("list<float32>", [1.0], "'x' is list<float32>: lists of variable length"),
        ("list<string, 1>", ["a"], "'x' has type string"),
        ("bytes", b"a", "'x' has type binary"),
        ("date", date(2026, 1, 1), "'x' has type date32"),
        ("decimal(3, 1)", Decimal("1.5"), "'x' has type decimal128"),
    ],
)
def test_an_input_that_is_not_a_number_is_refused(dtype: str, value: Any, message: str) -> None:
    """A decimal is not converted to float; a transform must do that."""
    with pytest.raises(TrainingSetError, match=message):
        prepare(config(), source_with_column(dtype, pa.array([value] * ROWS, DTYPES[dtype])))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "model.family is missing"),
        ({"family": "forest"}, "Unknown model family 'forest'"),
        ({"family": "lightgbm", "leaves": 3}, "leaves"),
        ({"family": "lightgbm", "learning_rate": 2.0}, "between 0 and 1"),
        ({"family": "mine", "module": "no.such.module"}, "cannot be imported"),
        ({"family": "mine", "module": "json"}, "has no 'Parameters'"),
    ],
)
def test_an_invalid_family_is_refused(model: dict[str, Any], message: str) -> None:
    """Unknown family, wrong parameter, or a module without the names of the protocol."""
    with pytest.raises(ConfigError, match=message):
        resolve_family(model)


def test_auc_equals_scikit_learn_with_ties() -> None:
    """Compared with an independent implementation; undefined with one class."""
    draw = np.random.default_rng(3)
    scores, target = draw.integers(0, 20, 500) / 20, draw.integers(0, 2, 500)
    assert roc_auc(scores, target) == pytest.approx(roc_auc_score(target, scores))
    assert roc_auc(scores, np.ones(500, np.int64)) is None


def test_a_calibrated_model_has_no_calibration_error() -> None:
    """Ten rows with probability 0.3, three of them positive."""
    metrics = binary_metrics(np.full(10, 0.3), np.array([1] * 3 + [0] * 7))
    assert metrics["ece"] == pytest.approx(0.0)
    assert metrics["accuracy"] == pytest.approx(0.7)


@pytest.mark.parametrize(("task", "target"), [(Task.binary, 2), (Task.multiclass, 3), (Task.regression, 5)])
def test_the_exported_graph_gives_finite_scores_for_every_task(
    tmp_path: Path, task: Task, target: int
) -> None:
    """Including rows with missing values. `export` itself compares the scores with those of the network."""
    values = [n % target for n in range(ROWS)]
    rows = source(y=values, age=[None if n % 7 == 0 else float(n) for n in range(ROWS)])
    data = prepare(config(task=task), rows)
    signature = network_signature(prepare_rows(config(task=task), rows))
    shape = network_shape(signature, Parameters(width=8, depth=1, embedding_dim=2))
    torch.manual_seed(0)
    network = TabularNetwork(shape)
    weights = tmp_path / "w.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, str(weights))
    folder = tmp_path / "model"
    folder.mkdir()
    export(shape, weights, folder, sample=data.matrix[:10])
    scores = OnnxEngine((folder / "model.onnx").read_bytes()).scores(data.matrix)
    assert scores.shape == ((ROWS, 3) if task is Task.multiclass else (ROWS,))
    assert np.isfinite(scores).all()
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.safetensors", "network.json"}


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    """The peak is at the end of the warm-up."""
    rates = [learning_rate(0.01, step / 100, warmup_share=0.1) for step in range(101)]
    assert max(rates) == pytest.approx(0.01)
    assert rates.index(max(rates)) == 10
    assert rates[-1] == pytest.approx(0.0)


def test_without_a_manifest_identifiers_are_not_inputs() -> None:
    """Regardless of the split column."""
    data = prepare(config(split=SplitConfig(column=None)), source(customer_id=list(range(ROWS))))
    assert data.signature.columns == ["age", "code"]


def test_the_label_as_input_is_refused() -> None:
    """A model that gets its own label as input would look perfect."""
    with pytest.raises(TrainingSetError, match="among the inputs"):
        prepare(config(inputs=["age", "y"]), source())


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{not json", "not the manifest of a training set"),
        ("[]", "not the manifest of a training set"),
        ('{"rows": 999, "columns": []}', "describes 999 rows"),
        (f'{{"rows": {ROWS}, "columns": [{{"name": "income"}}]}}', "no column 'income'"),
    ],
)
def test_a_manifest_of_another_file_is_refused(tmp_path: Path, manifest: str, message: str) -> None:
    """Lineage must not refer to rows that were not used in training."""
    pq.write_table(source().table, tmp_path / "t.parquet")
    (tmp_path / "t.manifest.json").write_text(manifest)
    with pytest.raises(TrainingSetError, match=message):
        read_file(tmp_path)


def read_file(folder: Path) -> TrainingSet:
    """Read `t.parquet` of a folder outside the storage root."""
    return read_training_set(
        str(folder / "t.parquet"),
        ProtectedFiles(Keyring.create(folder / "keyring.json", b"k" * 32)),
        places=Layout(str(folder / "elsewhere")),
        ledger=Ledger(f"sqlite:///{folder}/l.db"),
    )


def test_arrow_string_views_are_text(tmp_path: Path) -> None:
    """They can be inputs, label and split column, like any other text."""
    texts = {
        "code": [str(n % 3) for n in range(ROWS)],
        "y": [("no", "yes")[n % 2] for n in range(ROWS)],
        "town": [f"t{n}" for n in range(ROWS)],
    }
    settings = config(inputs=["age", "code"], split=SplitConfig(column="town"))
    prepared = []
    for dtype in (pa.string(), pa.string_view()):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        columns = {name: pa.array(values, dtype) for name, values in texts.items()}
        pq.write_table(source(**columns).table, folder / "t.parquet")
        prepared.append(prepare(settings, read_file(folder)))
    expected, data = prepared
    assert data.signature == expected.signature
    assert np.array_equal(data.matrix, expected.matrix)
    assert np.array_equal(data.target, expected.target)
    assert np.array_equal(data.held_out, expected.held_out)


@pytest.mark.parametrize("content", ["{nope", "[]", "{}", '{"best": 3}'])
def test_params_from_without_best_parameters_is_refused(tmp_path: Path, content: str) -> None:
    """The error is a refusal in one line, not a traceback."""
    (tmp_path / "s.json").write_text(content)
    settings = TrainConfig(name="m", training_set="t", label="y", params_from=str(tmp_path / "s.json"))
    with pytest.raises(ConfigError, match="output of a sweep"):
        model_with_best_parameters(settings)


def test_a_family_is_refused_by_the_command_that_has_other_data() -> None:
    """The message names the other command. A decoder needs text files, the other families a training set."""
    with pytest.raises(
        ConfigError, match=r"model=decoder is fitted to text files. Use `python -m jobs.train_text`"
    ):
        resolve_family({"family": "decoder"})
    with pytest.raises(
        ConfigError, match=r"model=lightgbm is fitted to a training set. Use `python -m jobs.train`"
    ):
        resolve_family({"family": "lightgbm"}, reads_text=True)
    with pytest.raises(ConfigError, match=r"Unknown model family 'decodr'. Known: decoder"):
        resolve_family({"family": "decodr"}, reads_text=True)


def test_an_impossible_split_is_refused() -> None:
    """When the configuration is loaded, before data is read."""
    with pytest.raises(ValueError, match="remainder"):
        SplitConfig(modulo=4, remainder=4)


def test_a_fit_stays_on_this_node_if_its_checkpoints_do() -> None:
    """LightGBM writes none. Another node sees the network's checkpoints only in an object store."""
    network, trees = (resolve_family({"family": name}) for name in ("tabular_network", "lightgbm"))
    here, shared = RunFolder(path="/runs"), RunFolder(path="bucket/runs", file_system=LocalFileSystem())
    assert "checkpoints" in str(why_on_this_node(network, here))
    assert why_on_this_node(network, shared) is None
    assert why_on_this_node(trees, here) is None
    assert "of your own" in str(why_on_this_node(trees._replace(runs_anywhere=False), shared))
