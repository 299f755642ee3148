"""From a float32 graph to an int8 one that is registered in its place, and what that costs in accuracy.

Weights become int8 when the version is made, activations uint8 as they come (ONNX Runtime's dynamic quantisation).
Their scale is that of a whole batch, so a row's score depends a little on the rows it is answered with. That is kept
small by leaving every layer in float32 but those that a LayerNormalization feeds: its outputs are bounded, so no row,
however extreme, takes the precision from the others. Weights use 7 of the 8 bits, because processors without VNNI add
up pairs of products in 16 bits, where 8 would overflow: a version scores the same wherever it is served.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from cluster.errors import ConfigError
from cluster.runtime import Precision
from cluster.runtime.onnx_engine import precision_of
from cluster.runtime.predictions import Predictions
from cluster.runtime.signature import ONNX_FILE

_LAYERS, _AS_THEY_ARE = ("Gemm", "MatMul"), ("Dropout", "Identity")


def quantise(folder: Path) -> None:
    """Put an int8 graph in the place of a model folder's float32 one.

    Raises:
        ConfigError: the family wrote no graph, or none with a layer that can be quantised.
    """
    path, whole = folder / ONNX_FILE, folder / f"whole-{ONNX_FILE}"
    if not path.exists():
        raise ConfigError(
            f"model.precision=int8 quantises {ONNX_FILE}, and the family wrote none. Leave it at float32."
        )
    graph = onnx.load(path)
    chosen = bounded_layers(graph)
    # A file of this folder, because what the quantiser is given as an object it writes to a folder of its own choice.
    path.rename(whole)
    try:
        if chosen:
            with _quiet():
                quantize_dynamic(
                    whole,
                    path,
                    op_types_to_quantize=["MatMul"],
                    nodes_to_quantize=chosen,
                    per_channel=True,
                    reduce_range=True,
                    weight_type=QuantType.QInt8,
                )
        if not chosen or precision_of(onnx.load(path)) is not Precision.int8:
            raise ConfigError(
                "model.precision=int8 quantises named layers that a LayerNormalization feeds, and "
                f"{ONNX_FILE} has none. Leave it at float32."
            )
    finally:
        whole.unlink()


def bounded_layers(graph: onnx.ModelProto) -> list[str]:
    """The names that the quantiser will know the layers by whose inputs are a LayerNormalization's outputs."""
    makers = {output: node for node in graph.graph.node for output in node.output}

    def is_bounded(tensor: str) -> bool:
        maker = makers.get(tensor)
        while maker is not None and maker.op_type in _AS_THEY_ARE:
            maker = makers.get(maker.input[0])
        return maker is not None and maker.op_type == "LayerNormalization"

    return [
        f"{node.name}_MatMul" if node.op_type == "Gemm" else node.name
        for node in graph.graph.node
        if node.op_type in _LAYERS and node.name and is_bounded(node.input[0])
    ]


def cost(before: Predictions, after: Predictions, metrics: dict[str, Any]) -> dict[str, Any]:
    """What quantising changed, for the version's metrics.

    Args:
        before: of the float32 graph, on the held-out rows.
        after: of the int8 one, on the same rows.
        metrics: of the float32 graph.
    """
    difference = np.abs(after.scores - before.scores)
    return {
        "float32": metrics,
        "mean_score_difference": float(difference.mean()),
        "largest_score_difference": float(difference.max()),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to pre-process, which is for static quantisation."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
