"""The FT-Transformer family: its hyper-parameters, how to build it, its loss, and its files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from cluster.runtime import Precision
from cluster.runtime.encoding import Matrix
from cluster.runtime.signature import WEIGHTS_FILE
from jobs.train.ft_transformer.network import FTTransformer, Size
from jobs.train.network.onnx_export import export_graph
from jobs.train.network.parameters import check_parameters
from jobs.train.network.protocol import NetworkSignature, Scoring, task_loss


@dataclass(kw_only=True, slots=True)
class Parameters:
    """Hyper-parameters of the FT-Transformer."""

    learning_rate: float = 0.004
    width: int = 32
    """Length of a token. `heads` divides it."""
    depth: int = 2
    """Number of blocks."""
    heads: int = 4
    hidden_factor: float = 4 / 3
    """Hidden units of a block's feed-forward network, as a multiple of `width`."""
    attention_dropout: float = 0.1
    dropout: float = 0.1
    """Dropout between the two layers of a block's feed-forward network."""
    weight_decay: float = 1e-5
    epochs: int = 12
    batch_size: int | None = None
    """Rows per step, of all workers together. None derives it from the number of rows."""
    precision: Precision = Precision.float32
    """Precision of the weights that are registered and served. Training always uses float32."""

    def __post_init__(self) -> None:
        check_parameters(self, counts=("width", "depth", "heads"), shares=("attention_dropout", "dropout"))
        if self.width % self.heads:
            raise ValueError(f"model.heads must divide model.width, got {self.heads} and {self.width}.")
        if not 0 < self.hidden_factor < math.inf:
            raise ValueError(f"model.hidden_factor must be finite and positive, got {self.hidden_factor}.")


def build(signature: NetworkSignature, parameters: Parameters) -> FTTransformer:
    """Return the network with random weights."""
    size = Size(
        width=parameters.width,
        depth=parameters.depth,
        heads=parameters.heads,
        hidden_factor=parameters.hidden_factor,
        attention_dropout=parameters.attention_dropout,
        hidden_dropout=parameters.dropout,
    )
    return FTTransformer(signature, size)


loss = task_loss


def export(
    network: torch.nn.Module,
    signature: NetworkSignature,
    parameters: Parameters,
    folder: Path,
    sample: Matrix,
) -> None:
    """Write `model.onnx` for serving, and `model.safetensors` to compare and continue the weights.

    Args:
        network: The trained network, on the CPU.
        signature: Signature of the network.
        parameters: Hyper-parameters.
        folder: Folder to write the files to.
        sample: Encoded rows on which the scores of the graph and of the network are compared.

    Raises:
        Inconsistent: The scores of the graph and of the network differ.
    """
    export_graph(Scoring(network, signature), folder, sample=sample)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, str(folder / WEIGHTS_FILE))
