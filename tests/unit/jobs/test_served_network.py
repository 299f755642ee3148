"""Serving a tabular network: in ONNX Runtime, in torch, and quantised to int8."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch
from onnx import TensorProto, helper

from cluster.errors import ConfigError, RefusedError
from cluster.runtime import InputSpec, Model, ModelSignature, Precision, Task, open_model, parse_signature
from cluster.runtime.device_choice import CUDA, Hardware
from cluster.runtime.onnx_engine import OnnxEngine
from cluster.runtime.signature import NETWORK_FILE, ONNX_FILE, SIGNATURE_FILE, WEIGHTS_FILE
from cluster.runtime.torch_engine import TorchEngine
from jobs.train.__main__ import requested_precision
from jobs.train.quantise import bounded_layers, quantisation_cost, quantise
from jobs.train.tabular_network.family import Parameters
from tests.samples.network import as_int8, rows, write_network
from tests.samples.signatures import of_each_task

INPUTS = (
    InputSpec(name="p__age", dtype="double"),
    InputSpec(name="p__sex", dtype="string", categories=("f", "m")),
    InputSpec(name="p__income", dtype="double"),
)
SIGNATURES = of_each_task(*INPUTS)
BINARY = SIGNATURES.binary


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    """Folders with a float32 network of each task."""
    root = tmp_path_factory.mktemp("networks")
    for signature in SIGNATURES:
        write_network(root / signature.task.value, signature)
    return {signature.task: root / signature.task.value for signature in SIGNATURES}


@pytest.fixture
def quantised(folders: dict[Task, Path], tmp_path: Path) -> Path:
    """Folder with the binary network as int8."""
    for path in folders[Task.binary].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    quantise(tmp_path)
    (tmp_path / SIGNATURE_FILE).write_text(as_int8(BINARY).to_json())
    return tmp_path


def torch_model(folder: Path, signature: ModelSignature) -> Model:
    shape, weights = ((folder / name).read_bytes() for name in (NETWORK_FILE, WEIGHTS_FILE))
    return Model(signature, TorchEngine(shape, weights, hardware=Hardware()))


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: signature.task.value)
def test_torch_and_onnx_runtime_give_the_same_scores(
    folders: dict[Task, Path], signature: ModelSignature
) -> None:
    """For one row and for many, including missing values, unknown categories and extreme numbers."""
    matrix = rows(signature, 200)
    matrix[:4, 0] = [1e30, 3.4e38, -3.4e38, 1e19]
    onnx_model, network = open_model(folders[signature.task]), torch_model(folders[signature.task], signature)
    for part in (matrix, matrix[:1]):
        torch_scores, onnx_scores = (model.predict_matrix(part).scores for model in (network, onnx_model))
        assert np.allclose(torch_scores, onnx_scores, atol=1e-5, rtol=1e-5)
    assert np.ptp(scores := network.predict_matrix(matrix).scores) > 1e-3, scores


@pytest.mark.parametrize(
    ("shape", "weights"), [(b"{}", None), (b"no json", None), (None, b"no weights"), (b'{"width": 3}', None)]
)
def test_invalid_network_files_are_refused(
    folders: dict[Task, Path], shape: bytes | None, weights: bytes | None
) -> None:
    """The message names the files. Weights of another network are refused, too."""
    files = {name: (folders[Task.binary] / name).read_bytes() for name in (NETWORK_FILE, WEIGHTS_FILE)}
    with pytest.raises(RefusedError, match=f"{NETWORK_FILE} and {WEIGHTS_FILE} are not a valid network"):
        TorchEngine(shape or files[NETWORK_FILE], weights or files[WEIGHTS_FILE], hardware=Hardware())
    wider = json.dumps(json.loads(files[NETWORK_FILE]) | {"width": 32}).encode()
    with pytest.raises(RefusedError, match="are not a valid network"):
        TorchEngine(wider, files[WEIGHTS_FILE], hardware=Hardware())


def test_int8_scores_are_close_to_float32(folders: dict[Task, Path], quantised: Path) -> None:
    """The cost is measured on the same rows. Quantising leaves no other files in the folder."""
    matrix = rows(BINARY, 500)
    before = open_model(folders[Task.binary]).predict_matrix(matrix)
    after = open_model(quantised).predict_matrix(matrix)
    difference = quantisation_cost(before, after, {"auc": 0.5})
    assert 0 < difference["mean_score_difference"] <= difference["largest_score_difference"] < 0.02
    assert difference["float32"] == {"auc": 0.5}
    assert {path.name for path in quantised.iterdir()} == {
        path.name for path in folders[Task.binary].iterdir()
    }


def test_an_extreme_row_does_not_change_the_scores_of_its_batch(quantised: Path) -> None:
    """The activations of a batch share one scale, but the layer that gets the client's numbers is not quantised."""
    model, matrix = open_model(quantised), rows(BINARY, 50)
    alone = model.predict_matrix(matrix).scores
    extreme = np.array([[1e30, 0, -1e30]], dtype=np.float32)
    beside = model.predict_matrix(np.vstack([matrix, extreme])).scores[:50]
    assert np.abs(alone - beside).max() < 0.02


def test_only_layers_after_a_normalisation_are_quantised(folders: dict[Task, Path]) -> None:
    """A network of depth two has three layers; the first is not quantised."""
    graph = onnx.load(folders[Task.binary] / ONNX_FILE)
    layers = [node.name for node in graph.graph.node if node.op_type == "Gemm"]
    assert len(layers) == 3
    assert bounded_layers(graph) == [f"{name}_MatMul" for name in layers[1:]]


@pytest.mark.parametrize("registered", list(Precision))
def test_a_graph_whose_precision_is_not_the_registered_one_is_refused(
    folders: dict[Task, Path], quantised: Path, registered: Precision
) -> None:
    """float32 registered as int8, and int8 registered as float32."""
    folder = folders[Task.binary] if registered is Precision.int8 else quantised
    data = (folder / ONNX_FILE).read_bytes()
    with pytest.raises(RefusedError, match=f"was registered as {registered.value}"):
        OnnxEngine(data, precision=registered)


def test_an_int8_version_runs_on_the_cpu_even_with_a_gpu(
    quantised: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning says that the GPU is not used. A signature without a precision is float32."""
    gpu = Hardware(device=CUDA)
    matrix = rows(BINARY, 10)
    scores = open_model(quantised, hardware=gpu).predict_matrix(matrix).scores
    assert "a GPU is reserved, but an int8 graph runs on the CPU" in caplog.text
    assert np.array_equal(scores, open_model(quantised).predict_matrix(matrix).scores)
    assert parse_signature((quantised / SIGNATURE_FILE).read_bytes()) == as_int8(BINARY)
    older = json.loads(BINARY.to_json())
    del older["precision"]
    assert parse_signature(json.dumps(older)) == BINARY


def test_the_cuda_device_has_an_index() -> None:
    """Torch limits the memory only of a device with an index."""
    assert (torch.device(CUDA).type, torch.device(CUDA).index) == ("cuda", 0)


def test_a_graph_runs_on_the_configured_number_of_threads(folders: dict[Task, Path]) -> None:
    """The caller's thread is one of them."""
    process = psutil.Process()
    before = process.num_threads()
    model = open_model(folders[Task.binary], hardware=Hardware(num_threads=4))
    assert process.num_threads() == before + 3
    del model


def test_a_model_that_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    """A family without a graph, and a graph without a layer after a normalisation."""
    with pytest.raises(ConfigError, match="the family did not write it"):
        quantise(tmp_path)
    weights = helper.make_tensor("w", TensorProto.FLOAT, [3, 1], [1.0, 2.0, 3.0])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["inputs", "w"], ["scores"], name="only")],
        "g",
        [value("inputs", TensorProto.FLOAT, ["n", 3])],
        [value("scores", TensorProto.FLOAT, ["n", 1])],
        [weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / ONNX_FILE)
    with pytest.raises(ConfigError, match="has no such layer"):
        quantise(tmp_path)
    assert not list(tmp_path.glob("float32*"))


def test_the_precision_to_register_comes_from_the_family() -> None:
    """float32 if the family has no such parameter. A value of another type is refused."""
    assert requested_precision(Parameters(precision=Precision.int8)) is Precision.int8
    assert requested_precision(object()) is Precision.float32
    with pytest.raises(ConfigError, match="must be a"):
        requested_precision(type("OwnParameters", (), {"precision": "int8"})())
