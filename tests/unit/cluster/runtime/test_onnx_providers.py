"""Where ONNX Runtime runs a graph. No test uses a real GPU, because the machines of the tests have none."""

from __future__ import annotations

import logging

import numpy as np
import onnxruntime as ort
import pytest

from cluster.runtime.device_choice import CUDA, Hardware
from cluster.runtime.onnx_engine import OnnxEngine
from cluster.runtime.onnx_providers import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    choose_providers,
    find_providers,
    report_provider,
)
from cluster.runtime.signature import Precision
from tests.unit.cluster.runtime.test_onnx_engine import Graph

QUARTER = Hardware(device=CUDA, memory_share=0.25)
BOTH = [CUDA_PROVIDER, CPU_PROVIDER]


def test_a_replica_with_a_gpu_uses_its_share_of_the_memory() -> None:
    """Four replicas with a quarter each fit on one GPU."""
    (name, options), fallback = choose_providers(
        QUARTER, Precision.float32, available=BOTH, gpu_bytes=80 << 30
    )
    assert (name, fallback) == (CUDA_PROVIDER, CPU_PROVIDER)
    assert options["gpu_mem_limit"] == 20 << 30


@pytest.mark.parametrize(
    ("hardware", "precision", "available"),
    [
        (Hardware(), Precision.float32, BOTH),
        (QUARTER, Precision.int8, BOTH),
        (QUARTER, Precision.float32, [CPU_PROVIDER]),
    ],
)
def test_everything_else_runs_on_the_cpu(
    hardware: Hardware, precision: Precision, available: list[str]
) -> None:
    """No reserved GPU, an int8 graph, or an ONNX Runtime without CUDA."""
    assert choose_providers(hardware, precision, available=available, gpu_bytes=1) == [CPU_PROVIDER]


def test_a_session_without_a_gpu_names_the_cpu() -> None:
    """The installed ONNX Runtime has no CUDA."""
    assert find_providers(Hardware(), Precision.float32, available=ort.get_available_providers()) == [
        CPU_PROVIDER
    ]
    engine = OnnxEngine(Graph().to_bytes())
    assert engine.provider == CPU_PROVIDER
    assert engine.scores(np.zeros((1, 2), np.float32)).shape == (1, 1)


@pytest.mark.parametrize(
    ("used", "precision", "text"),
    [
        (CUDA_PROVIDER, Precision.float32, "runs on the GPU (CUDAExecutionProvider), within 25%"),
        (CPU_PROVIDER, Precision.int8, "an int8 graph runs on the CPU"),
        (CPU_PROVIDER, Precision.float32, "onnxruntime-gpu or a CUDA library is missing"),
    ],
)
def test_the_start_says_where_the_graph_runs(
    caplog: pytest.LogCaptureFixture, used: str, precision: Precision, text: str
) -> None:
    """ONNX Runtime itself falls back to the CPU silently."""
    with caplog.at_level(logging.WARNING, "falaj.runtime"):
        report_provider(used, QUARTER, precision)
    assert text in caplog.text
