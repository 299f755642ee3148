"""Quantise a model's float32 ONNX graph to int8, and measure the loss of accuracy.

This uses ONNX Runtime's dynamic quantisation: weights become int8 before registration, activations become uint8 during
inference. All activations of a batch have the same scale, so a row's score depends slightly on the other rows of the
batch. To keep this effect small, a layer is only quantised if its input is the output of a LayerNormalization. Such an
input is bounded, so an extreme row cannot reduce the precision of the other rows. All other layers stay in float32.

Weights use only 7 of the 8 bits. Processors without VNNI add pairs of products in 16 bits. These sums would overflow
with 8-bit weights. With 7 bits, a version gives the same scores on every processor.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from cluster.errors import ConfigError
from cluster.runtime import Precision, Task
from cluster.runtime.onnx_engine import precision_of
from cluster.runtime.predictions import Predictions
from cluster.runtime.signature import ONNX_FILE
from jobs.parity import compare_scores, require_parity

_LAYERS = ("Gemm", "MatMul")
_PASS_THROUGH = ("Dropout", "Identity")
"""Operators that do not change their input during inference."""


def quantise(folder: Path) -> None:
    """Replace the float32 graph of a model folder with an int8 graph.

    Raises:
        ConfigError: The folder has no graph, or the graph has no layer that can be quantised.
    """
    path, float32_path = folder / ONNX_FILE, folder / f"float32-{ONNX_FILE}"
    if not path.exists():
        raise ConfigError(
            f"model.precision=int8 needs {ONNX_FILE}, but the family did not write it. Set model.precision=float32."
        )
    graph = onnx.load(path)
    layers = bounded_layers(graph)
    # The quantiser gets a file in this folder. If it got the graph as an object, it would write it to another folder.
    path.rename(float32_path)
    try:
        if layers:
            with _suppress_warnings():
                quantize_dynamic(
                    float32_path,
                    path,
                    op_types_to_quantize=["MatMul"],
                    nodes_to_quantize=layers,
                    per_channel=True,
                    reduce_range=True,
                    weight_type=QuantType.QInt8,
                )
        if not layers or precision_of(onnx.load(path)) is not Precision.int8:
            raise ConfigError(
                "model.precision=int8 quantises named layers whose input is the output of a LayerNormalization, but "
                f"{ONNX_FILE} has no such layer. Set model.precision=float32."
            )
    finally:
        float32_path.unlink()


def bounded_layers(graph: onnx.ModelProto) -> list[str]:
    """Return the quantiser's names for the layers whose input is the output of a LayerNormalization."""
    producers = {output: node for node in graph.graph.node for output in node.output}

    def is_bounded(tensor: str) -> bool:
        producer = producers.get(tensor)
        while producer is not None and producer.op_type in _PASS_THROUGH:
            producer = producers.get(producer.input[0])
        return producer is not None and producer.op_type == "LayerNormalization"

    return [
        f"{node.name}_MatMul" if node.op_type == "Gemm" else node.name
        for node in graph.graph.node
        if node.op_type in _LAYERS and node.name and is_bounded(node.input[0])
    ]


def quantisation_cost(float32: Predictions, int8: Predictions, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of the float32 graph, and how far the int8 scores differ from the float32 scores.

    Args:
        float32: Predictions of the float32 graph on the held-out rows.
        int8: Predictions of the int8 graph on the same rows.
        metrics: Metrics of the float32 graph.

    Raises:
        RefusedError: The scores differ too much.
    """
    parity = compare_scores(
        float32.scores,
        int8.scores,
        precision=Precision.int8,
        is_number=float32.signature.task is Task.regression,
    )
    require_parity(parity, model="the network")
    return {
        "float32": metrics,
        "mean_score_difference": parity["mean_score_difference"],
        "largest_score_difference": parity["largest_score_difference"],
    }


@contextlib.contextmanager
def _suppress_warnings() -> Iterator[None]:
    """Suppress the quantiser's advice to pre-process the model. The advice is only for static quantisation."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
