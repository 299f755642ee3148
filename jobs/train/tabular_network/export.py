"""Export a trained network for serving.

Replicas on CPU load an ONNX graph whose input is the encoded matrix. Replicas with a GPU load shape and weights.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file

from cluster.runtime.encoding import Matrix
from cluster.runtime.signature import NETWORK_FILE, WEIGHTS_FILE
from cluster.runtime.tabular_network import NetworkShape, ScoringNetwork, TabularNetwork
from jobs.train.onnx_export import export_graph


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
    export_graph(ScoringNetwork(network), folder, sample=sample)
    shutil.copyfile(weights, folder / WEIGHTS_FILE)
    (folder / NETWORK_FILE).write_text(json.dumps(asdict(shape)))
