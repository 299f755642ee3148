"""The decoder: a causal transformer that predicts the next byte.

Pre-norm blocks (Vaswani et al. 2017, arXiv 1706.03762) with RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, equation
4), rotary embeddings (Su et al. 2021, arXiv 2104.09864, equation 34) and SwiGLU (Shazeer 2020, arXiv 2002.05202,
equation 6), without biases.

A row of tokens has pieces of several documents. Each document begins with the token `DOCUMENT`, so the network finds
the boundaries by itself: positions start again at a boundary, and no token attends to another document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

DOCUMENT = 256
"""Token at the beginning of each document. The tokens 0 to 255 are bytes."""
VOCABULARY = 257
IGNORED = -100
"""Target of a position without a next token. It has no loss."""
ROTARY_BASE = 10_000.0
MULTIPLE = 64
"""The hidden width is rounded up to a multiple of this, because GPUs multiply such matrices faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """All values that are needed to rebuild the network, as plain data."""

    width: int
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads. `width / heads` must be an even number."""
    dropout: float

    @property
    def hidden(self) -> int:
        """Width of SwiGLU: 8/3 of the network's width, so that its three matrices have as many weights as two of 4."""
        return -(-8 * self.width // (3 * MULTIPLE)) * MULTIPLE


class Decoder(nn.Module):
    """Computes logits of the next token, [rows, length, VOCABULARY], from tokens, int64 [rows, length]."""

    def __init__(self, shape: DecoderShape, *, checkpoint_blocks: bool = False) -> None:
        """Build the network with random weights.

        Args:
            shape: The network's shape.
            checkpoint_blocks: Whether training computes the activations of each block again instead of storing them.
        """
        super().__init__()
        self.shape, self.checkpoint_blocks = shape, checkpoint_blocks
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # The sum of the blocks' outputs then has the same variance at every depth (GPT-2, section 2.3).
                is_output = name.endswith(("output.weight", "down.weight"))
                std = 0.02 / (2 * shape.depth) ** 0.5 if is_output else 0.02
                nn.init.normal_(parameter, std=std)

    def gradient_checkpointing_enable(self) -> None:
        """Compute activations again from now on. The name is that of Hugging Face's models."""
        self.checkpoint_blocks = True

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, [rows, length, VOCABULARY]."""
        layout = find_documents(inputs)
        hidden = self.embedding(inputs)
        rotation = rotary_angles(layout.positions, self.shape.width // self.shape.heads, dtype=hidden.dtype)
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                hidden = checkpoint(block, hidden, rotation, layout.mask, use_reentrant=False)
            else:
                hidden = block(hidden, rotation, layout.mask)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Block(nn.Module):
    """One pre-norm block: attention, then SwiGLU."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)
        self.hidden_norm = nn.RMSNorm(shape.width)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden), rotation, mask))
        normed = self.hidden_norm(hidden)
        swiglu = self.down(functional.silu(self.gate(normed)) * self.up(normed))
        result: Tensor = hidden + self.dropout(swiglu)
        return result

    def _attend(self, normed: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        split = self.attention(normed).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        result = functional.scaled_dot_product_attention(
            rotate(query, rotation), rotate(key, rotation), value, attn_mask=mask, is_causal=mask is None
        )
        attended: Tensor = self.output(result.transpose(1, 2).flatten(2))
        return attended


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the documents of some rows are."""

    positions: Tensor
    """Position of each token in its document, or in its row if the document began before, int64 [rows, length]."""
    mask: Tensor | None
    """Whether a token attends to another one, bool [rows, 1, length, length]; None if each row is one document. Then
    attention is only causal, which has faster kernels."""


def find_documents(tokens: Tensor) -> RowLayout:
    """Return positions and mask of rows of tokens, int64 [rows, length]."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    starts = tokens == DOCUMENT
    if not starts[:, 1:].any():
        return RowLayout(places.expand_as(tokens), None)
    begin = torch.where(starts, places, torch.zeros_like(places)).cummax(1).values
    same = begin.unsqueeze(2) == begin.unsqueeze(1)
    return RowLayout(places - begin, (same & (places.unsqueeze(1) >= places)).unsqueeze(1))


def rotary_angles(positions: Tensor, head_width: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each position's angles, [rows, 1, length, head_width / 2]."""
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angles = positions.unsqueeze(2).to(torch.float32) * ROTARY_BASE**-exponents
    return angles.cos().unsqueeze(1).to(dtype), angles.sin().unsqueeze(1).to(dtype)


def rotate(values: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of a query's or key's elements by its angle. A pair is an element of each half."""
    cosine, sine = rotation
    first, second = values.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)
