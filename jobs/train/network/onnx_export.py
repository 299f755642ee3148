"""Export a torch module that scores rows as an ONNX graph, and prove that both give the same scores."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from cluster.errors import Inconsistent
from cluster.runtime.encoding import Matrix
from cluster.runtime.onnx_engine import OnnxEngine
from cluster.runtime.signature import ONNX_FILE, ONNX_INPUT, ONNX_OUTPUT

OPSET = 18
"""Has LayerNormalization (17). Scaled dot-product attention becomes MatMul and Softmax."""
TOLERANCE = 1e-5
"""Absolute and relative tolerance between the scores of the graph and of the module."""


def export_graph(scoring: torch.nn.Module, folder: Path, *, sample: Matrix) -> None:
    """Write `model.onnx` into the folder.

    Args:
        scoring: Computes scores [rows] or [rows, classes] from encoded rows. It is in evaluation mode.
        folder: Folder to write the file to.
        sample: Encoded rows on which the scores of the graph and of the module are compared.

    Raises:
        Inconsistent: The scores of the graph and of the module differ.
        RefusedError: The graph does not run on another number of rows.
    """
    rows = torch.tensor(sample)
    with warnings.catch_warnings():
        # The exporter warns that it is deprecated. The check below proves that the graph is correct.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            scoring,
            (rows,),
            str(folder / ONNX_FILE),
            input_names=[ONNX_INPUT],
            output_names=[ONNX_OUTPUT],
            dynamic_axes={ONNX_INPUT: {0: "rows"}, ONNX_OUTPUT: {0: "rows"}},
            opset_version=OPSET,
            dynamo=False,
        )
    engine = OnnxEngine((folder / ONNX_FILE).read_bytes())
    # Twice as many rows, too: a module that uses `len(rows)` becomes a graph for one number of rows.
    for part in (sample, np.concatenate([sample, sample])):
        with torch.no_grad():
            expected = scoring(torch.tensor(part)).numpy()
        actual = engine.scores(part)
        if not np.allclose(actual, expected, atol=TOLERANCE, rtol=TOLERANCE):
            raise Inconsistent(
                f"The exported graph differs from the network by {np.abs(actual - expected).max():.2e}."
            )
