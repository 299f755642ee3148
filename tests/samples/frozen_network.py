"""A user's network family: the embedding of the inputs is random and frozen, and a layer above it is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jobs.train.network.protocol import NetworkSignature, task_loss


@dataclass(kw_only=True, slots=True)
class Parameters:
    epochs: int = 2
    batch_size: int | None = 100
    learning_rate: float = 0.02
    weight_decay: float = 0.0


class FrozenNetwork(torch.nn.Module):
    """Two blocks, of which the first is not trained."""

    def __init__(self, signature: NetworkSignature) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            [
                torch.nn.Sequential(torch.nn.Linear(signature.width, 16), torch.nn.Tanh()),
                torch.nn.Sequential(torch.nn.Linear(16, signature.num_outputs)),
            ]
        )
        self.blocks[0].requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.nan_to_num(inputs / 100)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def build(signature: NetworkSignature, parameters: Parameters) -> FrozenNetwork:
    """Return the network with its first weights."""
    return FrozenNetwork(signature)


loss = task_loss
