"""Export a trained network for serving.

Replicas on CPU load an ONNX graph whose input is the encoded matrix. Replicas with a GPU load shape and weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from cluster.runtime.encoding import Matrix
from cluster.runtime.signature import NETWORK_FILE, WEIGHTS_FILE
from cluster.runtime.tabular_network import NetworkShape, ScoringNetwork, TabularNetwork
from jobs.train.network.onnx_export import export_graph


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
    write_files(network, folder, sample=sample)


def write_files(network: TabularNetwork, folder: Path, *, sample: Matrix) -> None:
    """Write the files of a network. For errors see `export`."""
    export_graph(ScoringNetwork(network), folder, sample=sample)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, str(folder / WEIGHTS_FILE))
    (folder / NETWORK_FILE).write_text(json.dumps(asdict(network.shape)))
