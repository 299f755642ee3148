"""Export a trained network for serving.

Replicas on CPU load an ONNX graph whose input is the encoded matrix. Replicas with a GPU load shape and weights.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from cluster.errors import Inconsistent
from cluster.runtime.encoding import Matrix
from cluster.runtime.onnx_engine import OnnxEngine
from cluster.runtime.signature import NETWORK_FILE, ONNX_FILE, ONNX_INPUT, ONNX_OUTPUT, WEIGHTS_FILE
from cluster.runtime.tabular_network import NetworkShape, ScoringNetwork, TabularNetwork

OPSET = 18
TOLERANCE = 1e-5
"""Absolute and relative tolerance between the scores of the graph and of the network."""


def export(shape: NetworkShape, weights: Path, folder: Path, *, sample: Matrix) -> None:
    """Write `model.onnx`, `model.safetensors` and `network.json`.

    Args:
        shape: Shape of the network.
        weights: safetensors file with the consolidated weights.
        folder: Folder to write the files to.
        sample: Encoded rows on which the scores of the graph and of the network are compared.

    Raises:
        Inconsistent: The scores of the graph and of the network differ.
    """
    network = TabularNetwork(shape)
    network.load_state_dict(load_file(str(weights)))
    scoring = ScoringNetwork(network)
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
    with torch.no_grad():
        expected = scoring(rows).numpy()
    actual = OnnxEngine((folder / ONNX_FILE).read_bytes()).scores(sample)
    if not np.allclose(actual, expected, atol=TOLERANCE, rtol=TOLERANCE):
        raise Inconsistent(
            f"The exported graph differs from the network by {np.abs(actual - expected).max():.2e}."
        )
    shutil.copyfile(weights, folder / WEIGHTS_FILE)
    (folder / NETWORK_FILE).write_text(json.dumps(asdict(shape)))
