"""The decoder family: its hyper-parameters, how to build it, its loss, and its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cluster.runtime.signature import DECODER_FILE, WEIGHTS_FILE
from jobs.train.decoder.network import IGNORED, Decoder, DecoderShape
from jobs.train.decoder.rows import Tokens
from jobs.train.network.parameters import check_parameters


@dataclass(kw_only=True, slots=True)
class Parameters:
    """Hyper-parameters of the decoder."""

    learning_rate: float = 0.003
    width: int = 128
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads. `width / heads` must be an even number."""
    length: int = 256
    """Tokens of a row: bytes, and one token at the beginning of each document."""
    dropout: float = 0.0
    weight_decay: float = 0.1
    epochs: int = 1
    batch_size: int = 16
    """Rows per step, of all workers together."""

    def __post_init__(self) -> None:
        check_parameters(self, counts=("width", "depth", "heads"), shares=("dropout",))
        if self.length < 2:
            raise ValueError(f"model.length must be at least 2, got {self.length}.")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width must be a multiple of 2 · model.heads, got {self.width} and {self.heads}."
            )

    @property
    def shape(self) -> DecoderShape:
        """The network's shape."""
        return DecoderShape(width=self.width, depth=self.depth, heads=self.heads, dropout=self.dropout)


@dataclass(frozen=True, slots=True)
class TextSignature:
    """A decoder needs to know nothing of its texts. This class has what the training loop asks for."""

    def encode_target(self, target: Tokens) -> torch.Tensor:
        """Return the next tokens as a tensor."""
        return torch.from_numpy(np.ascontiguousarray(target))


def build(signature: TextSignature, parameters: Parameters) -> Decoder:
    """Return the network with random weights."""
    return Decoder(parameters.shape)


def loss(outputs: torch.Tensor, target: torch.Tensor, signature: TextSignature) -> torch.Tensor:
    """Return the cross-entropy of all tokens that have a next token, in nats, divided by the number of all tokens.

    The divisor is the same for all rows. So the mean over the parts of a batch is the mean over the batch.

    Args:
        outputs: Logits, [rows, length, VOCABULARY].
        target: Next tokens, int64 [rows, length].
        signature: See `TextSignature`.
    """
    logits = outputs.float().flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, target.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / target.numel()


def export(
    network: Decoder, signature: TextSignature, parameters: Parameters, folder: Path, sample: object
) -> None:
    """Write `decoder.json` (the shape) and `model.safetensors` (the weights)."""
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, str(folder / WEIGHTS_FILE))
    (folder / DECODER_FILE).write_text(json.dumps(asdict(network.shape)))


def read_model(folder: Path) -> Decoder:
    """Return the network that `export` wrote."""
    network = Decoder(DecoderShape(**json.loads((folder / DECODER_FILE).read_text())))
    network.load_state_dict(load_file(str(folder / WEIGHTS_FILE)))
    return network
