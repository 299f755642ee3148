"""The protocol of a network family: a torch module and its loss. Training, checkpoints and sweeps come with it.

A family is a module with three names:

    Parameters                       a dataclass of hyper-parameters. `epochs`, `batch_size`, `learning_rate` and
                                     `weight_decay` are required.
    build(signature, parameters)     returns a `torch.nn.Module`. It gets a batch of encoded rows, float32
                                     [rows, signature.width] with NaN for missing values, and returns outputs.
    loss(outputs, target, signature) returns a scalar: the mean over the rows of the batch.

`target` is float32 for a binary task (0 or 1) and for a regression (standardised), and int64 for a multiclass task. A
parameter with `requires_grad=False` stays as `build` made it. A module may also have

    export(network, signature, parameters, folder, sample)
                                     writes the model's files. The default writes an ONNX graph, and expects outputs
                                     [rows, signature.num_outputs]: logits, or a standardised value.

`build` must use torch's random generator only, which the run's seed has set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.runtime import Task
from cluster.runtime.encoding import Matrix
from jobs.train.network.onnx_export import export_graph
from jobs.train.rows.target import Target
from jobs.train.training_data import TrainingData


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSignature:
    """What a network must know of its inputs and outputs. All of it comes from the rows to fit on."""

    task: Task
    num_outputs: int
    """1 for a binary task and a regression, else the number of classes."""
    width: int
    """Number of matrix columns."""
    categorical: list[int]
    """Positions of the categorical columns."""
    cardinalities: list[int]
    """Number of known categories of each categorical column. A value is a category's number, or NaN."""
    numeric: list[int]
    """Positions of the numeric columns."""
    means: list[float]
    """Mean of each numeric column, without missing values."""
    scales: list[float]
    """Standard deviation of each numeric column; 1 for a constant."""
    target_mean: float
    target_scale: float
    """A regression learns the target standardised with this mean and scale. Other tasks have 0 and 1."""

    def encode_target(self, target: Target) -> torch.Tensor:
        """Return the target in the form that `loss` gets."""
        match self.task:
            case Task.binary:
                return torch.from_numpy(target.astype(np.float32))
            case Task.multiclass:
                return torch.from_numpy(target.astype(np.int64))
            case Task.regression:
                return torch.from_numpy(((target - self.target_mean) / self.target_scale).astype(np.float32))


def network_signature(data: TrainingData) -> NetworkSignature:
    """Return the signature for the networks of a training set."""
    signature, statistics = data.signature, data.statistics
    categorical, columns = signature.categorical, signature.matrix_columns
    numeric = [position for position in range(signature.width) if position not in categorical]
    is_regression = signature.task is Task.regression
    target = data.target[data.fit]
    return NetworkSignature(
        task=signature.task,
        num_outputs=signature.num_scores,
        width=signature.width,
        categorical=categorical,
        cardinalities=[len(columns[position].categories or ()) for position in categorical],
        numeric=numeric,
        means=[float(statistics.means[position]) for position in numeric],
        scales=[float(statistics.spreads[position]) or 1.0 for position in numeric],
        target_mean=float(target.mean()) if is_regression else 0.0,
        target_scale=(float(target.std()) or 1.0) if is_regression else 1.0,
    )


def task_loss(outputs: torch.Tensor, target: torch.Tensor, signature: NetworkSignature) -> torch.Tensor:
    """Return the mean loss of a batch: cross-entropy, or half the squared error of the standardised target.

    Args:
        outputs: float32 [rows, signature.num_outputs]: logits, or the standardised value.
        target: see the protocol.
        signature: Signature of the network.
    """
    match signature.task:
        case Task.binary:
            return torch.nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), target)
        case Task.multiclass:
            return torch.nn.functional.cross_entropy(outputs, target)
        case Task.regression:
            return 0.5 * torch.nn.functional.mse_loss(outputs.squeeze(1), target)


class Scoring(torch.nn.Module):
    """A network for serving: without dropout, and with scores in the runtime's format instead of outputs."""

    def __init__(self, network: torch.nn.Module, signature: NetworkSignature) -> None:
        super().__init__()
        self.network, self.signature = network, signature
        self.eval()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return probabilities [rows] or [rows, classes], or values [rows]."""
        outputs: torch.Tensor = self.network(inputs)
        match self.signature.task:
            case Task.binary:
                return torch.sigmoid(outputs).squeeze(1)
            case Task.multiclass:
                return torch.softmax(outputs, 1)
            case Task.regression:
                return (outputs * self.signature.target_scale + self.signature.target_mean).squeeze(1)


def export_network(
    family: Any,
    signature: Any,
    parameters: Any,
    weights: dict[str, torch.Tensor],
    *,
    folder: Path,
    sample: Matrix,
) -> None:
    """Write the files of a trained network into the model folder.

    Args:
        family: Module of the family.
        signature: Signature of the network.
        parameters: Hyper-parameters.
        weights: All weights, by name.
        folder: Folder to write to.
        sample: Some encoded rows, on which the exported graph is compared with the network.

    Raises:
        Inconsistent: The scores of the graph and of the network differ.
    """
    network = family.build(signature, parameters)
    network.load_state_dict(weights)
    if hasattr(family, "export"):
        family.export(network, signature, parameters, folder, sample)
    else:
        export_graph(Scoring(network, signature), folder, sample=sample)
