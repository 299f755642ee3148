"""The tabular network: entity embeddings for categories, standardised numbers, and a multilayer perceptron.

The network takes the encoded matrix of `cluster.runtime.encoding`, with NaN for missing values. So the exported graph
needs no preprocessing. This module is not with the training code, because a replica with a GPU rebuilds the network
from its shape and weights. Entity embeddings: Guo & Berkhahn 2016, arXiv 1604.06737.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.runtime.signature import Task

MAX_DEVIATIONS = 1e6
"""Numbers are clipped to this many standard deviations from the mean. Otherwise normalising layers would overflow, and
engines handle an overflow differently."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkShape:
    """All values that are needed to rebuild the network, as plain data that can be sent to another process."""

    task: str
    num_outputs: int
    categorical: list[int]
    """Positions of the categorical inputs."""
    cardinalities: list[int]
    """Number of known categories of each categorical input."""
    numeric: list[int]
    """Positions of the numeric inputs."""
    means: list[float]
    """Mean of each numeric input over the training rows, without missing values."""
    scales: list[float]
    """Standard deviation of each numeric input; 1 for a constant."""
    target_mean: float
    target_scale: float
    """A regression learns the target standardised with this mean and scale. Other tasks have 0 and 1."""
    width: int
    depth: int
    embedding_dim: int
    dropout: float


class TabularNetwork(nn.Module):
    """Computes logits [rows, outputs] from encoded rows, float32 [rows, inputs]."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        sizes = torch.tensor([count + 1 for count in shape.cardinalities], dtype=torch.int64)
        # All inputs share one table. An input has a block of rows; the first is for missing and unknown values.
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
        """Return logits, or a standardised value, float32 [rows, outputs]."""
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
            clipped = scaled.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
            parts.append(torch.where(missing, torch.zeros_like(scaled), clipped))
            parts.append(missing.to(torch.float32))
        return torch.cat(parts, 1)


class ScoringNetwork(nn.Module):
    """The network for serving: without dropout, and with scores in the runtime's format instead of logits."""

    def __init__(self, network: TabularNetwork) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return probabilities [rows] or [rows, classes], or values [rows]."""
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
