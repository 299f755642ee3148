"""Tests of the choice of device and engine for a model version."""

from __future__ import annotations

import pytest

from cluster.errors import RefusedError
from cluster.runtime.device_choice import (
    CUDA,
    Hardware,
    Runner,
    choose_runner,
    find_hardware,
    replica_hardware,
)
from cluster.runtime.signature import Precision

NETWORK = ["model.json", "model.onnx", "model.safetensors", "network.json"]
GRAPH = ["model.json", "model.onnx"]
TREES = ["model.json", "model.txt"]
GPU = Hardware(device=CUDA)


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "has_cuda", "expected"),
    [
        (0.1, 0.0, False, Hardware(num_threads=1)),
        (0.1, 0.0, True, Hardware(num_threads=1)),
        (3.9, 0.0, False, Hardware(num_threads=3)),
        (1.0, 0.25, False, Hardware(num_threads=1)),
        (1.0, 0.25, True, Hardware(num_threads=1, device=CUDA, memory_share=0.25)),
        (2.0, 1.0, True, Hardware(num_threads=2, device=CUDA)),
        (2.0, 2.0, True, Hardware(num_threads=2, device=CUDA)),
    ],
)
def test_replica_hardware_follows_its_resources(
    num_cpus: float, num_gpus: float, has_cuda: bool, expected: Hardware
) -> None:
    """One thread per whole CPU, and a share of the GPU's memory if torch finds a GPU."""
    assert replica_hardware(num_cpus=num_cpus, num_gpus=num_gpus, has_cuda=has_cuda) == expected


def test_no_gpu_search_without_a_reserved_gpu() -> None:
    """Torch is not imported."""
    assert find_hardware(num_cpus=0.1, num_gpus=0.0) == Hardware()


@pytest.mark.parametrize(
    ("files", "precision", "hardware", "expected"),
    [
        (NETWORK, Precision.float32, Hardware(), Runner.onnx),
        (NETWORK, Precision.float32, GPU, Runner.torch),
        (NETWORK, Precision.int8, GPU, Runner.onnx),
        (NETWORK[:3], Precision.float32, GPU, Runner.onnx),
        (GRAPH, Precision.float32, GPU, Runner.onnx),
        (TREES, Precision.float32, GPU, Runner.lightgbm),
    ],
)
def test_engine_follows_files_precision_and_hardware(
    files: list[str], precision: Precision, hardware: Hardware, expected: Runner
) -> None:
    """Torch runs only a complete float32 network on a GPU."""
    assert choose_runner(files, precision, hardware) is expected


@pytest.mark.parametrize("files", [[], ["model.onnx", "model.txt"], ["model.safetensors", "network.json"]])
def test_no_model_file_or_two_are_refused(files: list[str]) -> None:
    with pytest.raises(RefusedError, match="exactly one of"):
        choose_runner(files, Precision.float32, GPU)
