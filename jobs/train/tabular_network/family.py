"""The tabular network family: embeddings of categories, scaled numbers, and dense layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.runtime import Precision
from cluster.runtime.encoding import Matrix
from cluster.runtime.tabular_network import NetworkShape, TabularNetwork
from jobs.train.network.parameters import check_parameters
from jobs.train.network.protocol import NetworkSignature, task_loss
from jobs.train.tabular_network.export import write_files


@dataclass(kw_only=True, slots=True)
class Parameters:
    """Hyper-parameters of the network."""

    learning_rate: float = 0.004
    width: int = 128
    depth: int = 2
    embedding_dim: int = 8
    dropout: float = 0.1
    weight_decay: float = 0.01
    epochs: int = 8
    batch_size: int | None = None
    """Rows per step, of all workers together. None derives it from the number of rows, see `plan_steps`."""
    precision: Precision = Precision.float32
    """Precision of the weights that are registered and served. Training always uses float32."""

    def __post_init__(self) -> None:
        check_parameters(self, counts=("width", "depth", "embedding_dim"), shares=("dropout",))


def build(signature: NetworkSignature, parameters: Parameters) -> TabularNetwork:
    """Return the network with its first weights."""
    return TabularNetwork(network_shape(signature, parameters))


loss = task_loss


def export(
    network: torch.nn.Module,
    signature: NetworkSignature,
    parameters: Parameters,
    folder: Path,
    sample: Matrix,
) -> None:
    """Write `model.onnx`, `model.safetensors` and `network.json`, for replicas on CPU and with a GPU."""
    assert isinstance(network, TabularNetwork)
    write_files(network, folder, sample=sample)


def network_shape(signature: NetworkSignature, parameters: Parameters) -> NetworkShape:
    """Return the network's shape, with the means and scales of the rows to fit on."""
    return NetworkShape(
        task=signature.task.value,
        num_outputs=signature.num_outputs,
        categorical=signature.categorical,
        cardinalities=signature.cardinalities,
        numeric=signature.numeric,
        means=signature.means,
        scales=signature.scales,
        target_mean=signature.target_mean,
        target_scale=signature.target_scale,
        width=parameters.width,
        depth=parameters.depth,
        embedding_dim=parameters.embedding_dim,
        dropout=parameters.dropout,
    )
