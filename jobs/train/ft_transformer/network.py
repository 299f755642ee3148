"""The FT-Transformer: each input of a row becomes a token, and a transformer reads the tokens.

Gorishniy et al. 2021, "Revisiting Deep Learning Models for Tabular Data", arXiv 2106.11959. The formulas below are from
section 3.3. Like the tabular network, the network takes the encoded matrix of `cluster.runtime.encoding`, with NaN for
missing values, so the exported graph needs no preprocessing.

Serving needs only the exported graph. So this module is with the training code, and no replica imports it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.runtime.tabular_network import MAX_DEVIATIONS
from jobs.train.network.protocol import NetworkSignature


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Size of the transformer, and its dropout."""

    width: int
    """Length of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads; they divide `width`."""
    hidden_factor: float
    """Hidden units of a block's feed-forward network, as a multiple of `width`."""
    attention_dropout: float
    hidden_dropout: float
    """Dropout between the two layers of a block's feed-forward network."""


class FeatureTokenizer(nn.Module):
    """Turns encoded rows [rows, inputs] into tokens [rows, 1 + inputs, width]; the first one is the CLS token.

    T_j = b_j + f_j(x_j) ("Feature Tokenizer"): for a number, f_j is x_j · W_j; for a category, it is a row of W_j. The
    paper has no missing values. Here, a missing number is replaced by its mean, which is 0, and a learned vector is
    added to its token. A missing or unknown category has a row of its own.
    """

    def __init__(self, signature: NetworkSignature, width: int) -> None:
        super().__init__()
        self.has_categories, self.has_numbers = bool(signature.categorical), bool(signature.numeric)
        numbers, inputs = len(signature.numeric), len(signature.numeric) + len(signature.categorical)
        sizes = torch.tensor([count + 1 for count in signature.cardinalities], dtype=torch.int64)
        self.cls = nn.Parameter(torch.empty(1, width))
        self.bias = nn.Parameter(torch.empty(inputs, width))
        # Layers of length zero have no gradient, and DeepSpeed and safetensors do not expect them.
        self.weight = nn.Parameter(torch.empty(max(1, numbers), width))
        self.missing = nn.Parameter(torch.empty(max(1, numbers), width))
        self.embedding = nn.Embedding(max(1, int(sizes.sum())), width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)  # as a linear layer starts
        self.register_buffer("offsets", torch.cumsum(sizes, 0) - sizes)
        self.register_buffer("categorical", torch.tensor(signature.categorical, dtype=torch.int64))
        self.register_buffer("numeric", torch.tensor(signature.numeric, dtype=torch.int64))
        self.register_buffer("means", torch.tensor(signature.means, dtype=torch.float32))
        self.register_buffer("scales", torch.tensor(signature.scales, dtype=torch.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = []
        if self.has_numbers:
            numbers = inputs[:, self.get_buffer("numeric")]
            missing = torch.isnan(numbers)
            scaled = (numbers - self.get_buffer("means")) / self.get_buffer("scales")
            values = torch.where(
                missing, torch.zeros_like(scaled), scaled.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
            )
            tokens.append(
                values.unsqueeze(2) * self.weight + missing.to(self.missing.dtype).unsqueeze(2) * self.missing
            )
        if self.has_categories:
            codes = inputs[:, self.get_buffer("categorical")]
            rows = torch.where(torch.isnan(codes), torch.zeros_like(codes), codes + 1).to(torch.int64)
            tokens.append(self.embedding(rows + self.get_buffer("offsets")))
        # Not `len(inputs)`: in the exported graph, that would be the number of the sample's rows.
        cls = self.cls.expand(inputs.shape[0], 1, -1)
        return torch.cat([cls, torch.cat(tokens, 1) + self.bias], 1)


class Attention(nn.Module):
    """Multi-head self-attention, over all tokens of a row."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, size.attention_dropout
        self.query = nn.Linear(size.width, size.width)
        self.key = nn.Linear(size.width, size.width)
        self.value = nn.Linear(size.width, size.width)
        self.output = nn.Linear(size.width, size.width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Return [rows, queries, width]: for each query, what it gets from the tokens."""
        result = functional.scaled_dot_product_attention(
            self._split(self.query(queries)),
            self._split(self.key(tokens)),
            self._split(self.value(tokens)),
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended: Tensor = self.output(result.transpose(1, 2).flatten(2))
        return attended

    def _split(self, values: Tensor) -> Tensor:
        """Return [rows, tokens, width] as [rows, heads, tokens, width / heads]."""
        split: Tensor = values.unflatten(2, (self.heads, -1))  # type: ignore[no-untyped-call]
        return split.transpose(1, 2)


class Block(nn.Module):
    """One pre-norm block: X + attention(norm(X)), then X + feed-forward(norm(X)), with ReGLU as activation.

    The first block has no normalisation before the attention, which the paper found necessary for a good result. Only
    the CLS token is used for the prediction, so the last block computes only that one.
    """

    def __init__(self, size: Size, *, first: bool, last: bool) -> None:
        super().__init__()
        hidden = max(1, int(size.width * size.hidden_factor))
        self.last = last
        self.attention_norm = nn.Identity() if first else nn.LayerNorm(size.width)
        self.attention = Attention(size)
        self.hidden_norm = nn.LayerNorm(size.width)
        self.gate = nn.Linear(size.width, hidden)
        self.up = nn.Linear(size.width, hidden)
        self.dropout = nn.Dropout(size.hidden_dropout)
        self.down = nn.Linear(hidden, size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.attention_norm(tokens)
        if self.last:
            tokens, queries = tokens[:, :1], normed[:, :1]
        else:
            queries = normed
        tokens = tokens + self.attention(queries, normed)
        normed = self.hidden_norm(tokens)
        hidden = functional.relu(self.gate(normed)) * self.up(normed)
        result: Tensor = tokens + self.down(self.dropout(hidden))
        return result


class FTTransformer(nn.Module):
    """Computes logits [rows, outputs] from encoded rows, float32 [rows, inputs]."""

    def __init__(self, signature: NetworkSignature, size: Size) -> None:
        super().__init__()
        self.tokenizer = FeatureTokenizer(signature, size.width)
        self.blocks = nn.ModuleList(
            Block(size, first=index == 0, last=index == size.depth - 1) for index in range(size.depth)
        )
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, signature.num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, or a standardised value, float32 [rows, outputs]: Linear(ReLU(norm(CLS)))."""
        tokens = self.tokenizer(inputs)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(functional.relu(self.norm(tokens[:, 0])))
        return logits
