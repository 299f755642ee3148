"""Wrap a graph of another tool, so that it takes the platform's matrix `inputs` and gives `scores`.

The wrapped graph fulfils the contract of `docs/guides/own-models.md`. So each replica, release and command can run it,
and no request pays for dictionaries or texts in Python. The nodes of the original graph stay as they are.

    inputs [rows, columns] ─▶ column ─▶ fill missing ─▶ number type, or text of the category ─▶ original graph ─▶ scores
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from cluster.runtime import ModelSignature
from cluster.runtime.signature import ONNX_INPUT, ONNX_OUTPUT
from jobs.register.artifact import TEXT, Artifact, drop_unused

PREFIX = "artifact/"
"""Prefix of all names of the original graph, so that none of them is `inputs` or `scores`."""


def adapt(artifact: Artifact, signature: ModelSignature, fills: Mapping[int, float]) -> onnx.ModelProto:
    """Return the wrapped graph.

    Args:
        artifact: The original graph.
        signature: Inputs in the order of the graph's columns.
        fills: Maps the position of a column to the value that replaces a missing value: a number, or the code of a
            category. Without a fill, a missing number stays NaN and a missing text becomes "".
    """
    model = compose.add_prefix(artifact.tensor_model, PREFIX)
    before = _Before(signature, fills)
    position = 0
    for one in artifact.inputs:
        width = len(signature.inputs) if one.width is None or len(artifact.inputs) == 1 else one.width
        before.add_input(f"{PREFIX}{one.name}", one.type, range(position, position + width))
        position += width
    graph = model.graph
    original = list(graph.node)
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(before.nodes)
    graph.node.extend(original)
    graph.node.append(helper.make_node("Identity", [f"{PREFIX}{artifact.output}"], [ONNX_OUTPUT]))
    graph.initializer.extend(before.constants)
    rows = artifact.fixed_rows or "rows"
    graph.input.append(
        helper.make_tensor_value_info(ONNX_INPUT, TensorProto.FLOAT, [rows, len(signature.inputs)])
    )
    graph.output.append(helper.make_tensor_value_info(ONNX_OUTPUT, TensorProto.FLOAT, None))
    drop_unused(graph)
    return model


class _Before:
    """Nodes that turn the matrix into the inputs of the original graph."""

    def __init__(self, signature: ModelSignature, fills: Mapping[int, float]) -> None:
        self._signature = signature
        self._fills = fills
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add_input(self, name: str, element: int, positions: Iterable[int]) -> None:
        """Add the nodes that compute one input of the original graph."""
        columns = [
            self._text(position) if element == TEXT else self._number(position, element)
            for position in positions
        ]
        if len(columns) == 1:
            self._node("Identity", columns, name)
        else:
            self._node("Concat", columns, name, axis=1)

    def _number(self, position: int, element: int) -> str:
        column = self._filled(position)
        return self._node("Cast", [column], f"number_{position}", to=element)

    def _text(self, position: int) -> str:
        """Look up the text of a category. A missing value has the last place of the table, and is an empty text."""
        texts = [*(self._signature.inputs[position].categories or ()), ""]
        code = self._filled(position)
        missing = self._node("IsNaN", [code], f"is_missing_{position}")
        last = self._constant(f"last_{position}", np.array([[len(texts) - 1]], np.float32))
        place = self._node("Where", [missing, last, code], f"place_{position}")
        place = self._node("Cast", [place], f"index_{position}", to=TensorProto.INT64)
        table = self._constant(f"texts_{position}", np.array(texts, dtype=object))
        return self._node("Gather", [table, place], f"text_{position}", axis=0)

    def _filled(self, position: int) -> str:
        index = self._constant(f"position_{position}", np.array([position], np.int64))
        column = self._node("Gather", [ONNX_INPUT, index], f"column_{position}", axis=1)
        if position not in self._fills:
            return column
        missing = self._node("IsNaN", [column], f"is_null_{position}")
        fill = self._constant(f"fill_{position}", np.array([[self._fills[position]]], np.float32))
        return self._node("Where", [missing, fill, column], f"filled_{position}")

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node(operator, inputs, [output], name=f"{operator}_{output}", **attributes)
        )
        return output

    def _constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name
