"""The FT-Transformer: its tokens, its exported graph, int8, and that it learns. It is trained by a plain torch loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score

from cluster.artifact import allowed_files
from cluster.runtime import InputSpec, ModelSignature, Precision, Task, open_model
from cluster.runtime.device_choice import CUDA, Hardware
from cluster.runtime.encoding import Matrix
from cluster.runtime.onnx_engine import OnnxEngine
from cluster.runtime.signature import ONNX_FILE, SIGNATURE_FILE
from jobs.train.data import Dataset
from jobs.train.ft_transformer.family import Parameters, build, export, loss
from jobs.train.ft_transformer.network import FTTransformer
from jobs.train.quantise import bounded_layers, quantise
from tests.samples.network import as_int8, rows
from tests.samples.row_signature import row_signature
from tests.samples.signatures import of_each_task

NUMBER = InputSpec(name="p__age", dtype="double")
CATEGORY = InputSpec(name="p__sex", dtype="string", categories=("f", "m"))
INPUTS = (NUMBER, CATEGORY, InputSpec(name="p__income", dtype="double"))
SIGNATURES = of_each_task(*INPUTS)
PARAMETERS = Parameters(width=16, heads=2)


def network(signature: ModelSignature, *, depth: int = 2) -> FTTransformer:
    torch.manual_seed(0)
    return build(row_signature(signature), replace(PARAMETERS, depth=depth)).eval()


def write(signature: ModelSignature, folder: Path) -> FTTransformer:
    model = network(signature)
    export(model, row_signature(signature), PARAMETERS, folder, rows(signature, 8))
    (folder / SIGNATURE_FILE).write_text(signature.to_json())
    return model


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: signature.task.value)
def test_the_exported_graph_gives_the_networks_scores(signature: ModelSignature, tmp_path: Path) -> None:
    """For one row and for many, including missing values, unknown categories and extreme numbers."""
    outputs = write(signature, tmp_path)
    matrix = rows(signature, 200)
    matrix[:4, 0] = [1e30, 3.4e38, -3.4e38, 1e19]
    model = open_model(tmp_path)
    with torch.no_grad():
        logits = outputs(torch.tensor(matrix))
    expected = {
        Task.binary: torch.sigmoid(logits).squeeze(1),
        Task.multiclass: torch.softmax(logits, 1),
        Task.regression: logits.squeeze(1) * 10 + 100,
    }[signature.task].numpy()
    for part in (slice(None), slice(0, 1)):
        assert np.allclose(model.predict_matrix(matrix[part]).scores, expected[part], atol=1e-4, rtol=1e-4)
    assert np.ptp(expected) > 1e-3
    assert allowed_files(tmp_path) == ["model.json", "model.onnx", "model.safetensors"]


@pytest.mark.parametrize("inputs", [(NUMBER,), (CATEGORY,)], ids=["numbers", "categories"])
def test_inputs_of_one_kind(inputs: tuple[InputSpec, ...], tmp_path: Path) -> None:
    """A network without categories, and one without numbers, can be exported and scores rows."""
    signature = of_each_task(*inputs).binary
    write(signature, tmp_path)
    scores = OnnxEngine((tmp_path / ONNX_FILE).read_bytes()).scores(rows(signature, 20))
    assert len(np.unique(scores)) > 1


def test_a_missing_value_is_neither_the_mean_nor_a_known_category() -> None:
    """A missing number, and an unknown category, have tokens of their own."""
    matrix: Matrix = np.array([[40, 0, 40], [np.nan, 0, 40], [40, np.nan, 40], [40, 1, 40]], dtype=np.float32)
    with torch.no_grad():
        logits = network(SIGNATURES.binary)(torch.tensor(matrix)).squeeze(1).numpy()
    assert len(np.unique(logits.round(6))) == 4


def test_the_last_block_computes_only_the_cls_token() -> None:
    """The result is the same as that of a block that computes all tokens."""
    model, matrix = network(SIGNATURES.binary, depth=3), torch.tensor(rows(SIGNATURES.binary, 10))
    with torch.no_grad():
        short = model(matrix)
        model.blocks[-1].last = False
        assert torch.allclose(short, model(matrix), atol=1e-6)


def test_int8_scores_are_close_to_float32(tmp_path: Path) -> None:
    """Of each block, the layers after a normalisation are quantised; the first block's attention has none."""
    write(SIGNATURES.binary, tmp_path)
    matrix = rows(SIGNATURES.binary, 500)
    before = open_model(tmp_path).predict_matrix(matrix).scores
    layers = bounded_layers(onnx.load(tmp_path / ONNX_FILE))
    assert [name.removeprefix("/network/blocks.").removesuffix("/MatMul") for name in layers] == [
        "0/gate", "0/up", "1/attention/key", "1/attention/value", "1/gate", "1/up",
    ]  # fmt: skip
    quantise(tmp_path)
    (tmp_path / SIGNATURE_FILE).write_text(as_int8(SIGNATURES.binary).to_json())
    after = open_model(tmp_path).predict_matrix(matrix).scores
    assert 0 < np.abs(before - after).max() < 0.02


def test_a_replica_with_a_gpu_runs_the_graph_on_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The installed ONNX Runtime is the one for CPUs, and the replica says so."""
    write(SIGNATURES.binary, tmp_path)
    model = open_model(tmp_path, hardware=Hardware(device=CUDA))
    assert len(model.predict_matrix(rows(SIGNATURES.binary, 3)).scores) == 3
    assert "a GPU is reserved, but the ONNX graph runs on the CPU" in caplog.text


def interaction(task: Task) -> Dataset:
    """Return 4,000 rows whose label is an interaction of a number and a category."""
    signature: ModelSignature = getattr(SIGNATURES, task.value)
    draw = np.random.default_rng(0)
    matrix = rows(signature, 4000)
    age, sex = np.nan_to_num(matrix[:, 0], nan=40.0), np.nan_to_num(matrix[:, 1], nan=-1.0)
    value = np.where(sex == 1, age - 40, 40 - age) / 20 + draw.normal(0, 0.2, len(age))
    target = {
        Task.binary: (value > 0).astype(np.int64),
        Task.multiclass: np.digitize(value, [-0.5, 0.5]).astype(np.int64),
        Task.regression: value * 10 + 100,
    }[task]
    part = np.arange(len(age)) % 10
    return Dataset(
        signature=signature,
        matrix=matrix,
        target=target,
        fit=part < 7,
        validation=part == 7,
        held_out=part > 7,
    )


@pytest.mark.parametrize("task", list(Task), ids=lambda task: task.value)
def test_it_learns_an_interaction(task: Task) -> None:
    """No input alone says anything about the label, so a linear model would have an AUC of 0.5."""
    dataset = interaction(task)
    signature = row_signature(dataset.signature, dataset)
    torch.manual_seed(0)
    model = build(signature, PARAMETERS)
    inputs = torch.tensor(dataset.matrix[dataset.fit])
    target = signature.encode_target(dataset.target[dataset.fit])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for step in range(150):
        batch = torch.from_numpy(np.random.default_rng(step).integers(0, len(inputs), 256))
        step_loss = loss(model(inputs[batch]), target[batch], signature)
        optimizer.zero_grad()
        step_loss.backward()
        optimizer.step()
    with torch.no_grad():
        outputs = model.eval()(torch.tensor(dataset.matrix[dataset.held_out])).numpy()
    truth = dataset.target[dataset.held_out]
    if task is Task.regression:
        assert r2_score(truth, outputs[:, 0] * signature.target_scale + signature.target_mean) > 0.7
    else:
        auc = roc_auc_score(truth == truth.max(), outputs[:, -1])
        assert auc > 0.9


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"width": 30, "heads": 4}, "model.heads must divide model.width, got 4 and 30"),
        ({"depth": 0}, "model.depth must be at least 1"),
        ({"attention_dropout": 1.0}, "model.attention_dropout must be between 0 and 1"),
        ({"hidden_factor": 0.0}, "model.hidden_factor must be finite and positive"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, float], message: str) -> None:
    """The message names the parameter and its value."""
    with pytest.raises(ValueError, match=message):
        Parameters(**parameters)  # type: ignore[arg-type]


def test_the_precision_is_a_parameter() -> None:
    """`jobs.train` quantises the graph of a family whose parameters ask for int8."""
    assert Parameters(precision=Precision.int8).precision is Precision.int8
