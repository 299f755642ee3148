"""The tabular network: entity embeddings for categories, standardised numbers, a multilayer perceptron.

It takes the encoded matrix as it comes from `cluster.runtime.encoding`, with NaN for what is missing, so that the
exported graph needs no step of its own before it. It stands here and not with its training because a replica with a GPU
builds it again from its shape and weights. Entity embeddings: Guo & Berkhahn 2016, arXiv 1604.06737.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.runtime.signature import Task

FARTHEST = 1e6
"""Standard deviations from the mean beyond which a number counts as this far: normalising layers would overflow, and
engines differ in what they make of that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkShape:
    """All that is needed to build the module again; plain values, so that it can cross a process boundary."""

    task: str
    num_outputs: int
    categorical: list[int]
    """Positions of the categorical inputs."""
    cardinalities: list[int]
    """Known categories of each."""
    numeric: list[int]
    """Positions of the numbers."""
    means: list[float]
    """Of each number in the training part, missing values left out."""
    scales: list[float]
    """Standard deviations, 1 for a constant."""
    target_mean: float
    target_scale: float
    """A regression's target is learned standardised; 0 and 1 for the other tasks."""
    width: int
    depth: int
    embedding_dim: int
    dropout: float


class TabularNetwork(nn.Module):
    """Encoded rows, float32 [rows, inputs], to logits [rows, outputs]."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        sizes = torch.tensor([count + 1 for count in shape.cardinalities], dtype=torch.int64)
        # One table for all inputs, each with its own rows; a block's first row stands for missing and unknown.
        self.embedding = nn.Embedding(int(sizes.sum()) if shape.categorical else 1, shape.embedding_dim)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.register_buffer("offsets", torch.cumsum(sizes, 0) - sizes)
        self.register_buffer("categorical", torch.tensor(shape.categorical, dtype=torch.int64))
        self.register_buffer("numeric", torch.tensor(shape.numeric, dtype=torch.int64))
        self.register_buffer("means", torch.tensor(shape.means, dtype=torch.float32))
        self.register_buffer("scales", torch.tensor(shape.scales, dtype=torch.float32))
        num_features = len(shape.categorical) * shape.embedding_dim + 2 * len(shape.numeric)
        self.layers = nn.Sequential(*_layers(num_features, shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, or a standardised value, float32 [rows, outputs]."""
        logits: Tensor = self.layers(self._features(inputs))
        return logits

    def _features(self, inputs: Tensor) -> Tensor:
        parts = []
        if self.shape.categorical:
            codes = inputs[:, self.get_buffer("categorical")]
            rows = torch.where(torch.isnan(codes), torch.zeros_like(codes), codes + 1).to(torch.int64)
            parts.append(self.embedding(rows + self.get_buffer("offsets")).flatten(1))
        if self.shape.numeric:
            numbers = inputs[:, self.get_buffer("numeric")]
            missing = torch.isnan(numbers)
            scaled = (numbers - self.get_buffer("means")) / self.get_buffer("scales")
            parts.append(torch.where(missing, torch.zeros_like(scaled), scaled.clamp(-FARTHEST, FARTHEST)))
            parts.append(missing.to(torch.float32))
        return torch.cat(parts, 1)


class ScoringNetwork(nn.Module):
    """What is served: the same network with scores as the runtime wants them, and no dropout."""

    def __init__(self, network: TabularNetwork) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """Probabilities [rows] or [rows, classes], or values [rows]."""
        outputs: Tensor = self.network(inputs)
        shape = self.network.shape
        match Task(shape.task):
            case Task.binary:
                return torch.sigmoid(outputs).squeeze(1)
            case Task.multiclass:
                return torch.softmax(outputs, 1)
            case Task.regression:
                return (outputs * shape.target_scale + shape.target_mean).squeeze(1)


def _layers(num_features: int, shape: NetworkShape) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(shape.depth):
        layers += [nn.Linear(num_features, shape.width), nn.SiLU(), nn.LayerNorm(shape.width)]
        layers.append(nn.Dropout(shape.dropout))
        num_features = shape.width
    return [*layers, nn.Linear(num_features, shape.num_outputs)]
