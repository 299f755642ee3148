"""Judge language models in bits per byte, and compare them with a bigram model.

Bits per byte is the cross-entropy of all tokens in bits, divided by the number of bytes. The ends of documents are
tokens, too, so predicting them costs bits; they are no bytes. Fewer bits are better; 8 is a model that knows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from jobs.train.decoder.corpus import Corpus
from jobs.train.decoder.network import DOCUMENT, IGNORED, VOCABULARY
from jobs.train.decoder.rows import Batch, PackedRows

_BLOCK = 1 << 16
"""Tokens that the bigram model reads at a time."""
SMOOTHING = 0.1
"""Added to each count of the bigram model (add-k smoothing), so that no pair has the probability zero."""


@dataclass(kw_only=True, slots=True)
class Bits:
    """Sum of the losses of some tokens, and the number of bytes among them."""

    bits: float = 0.0
    num_bytes: int = 0

    def add(self, bits: float, target: npt.NDArray[np.int64]) -> None:
        """Add the loss of these targets, in bits."""
        self.bits += bits
        self.num_bytes += int(((target != IGNORED) & (target != DOCUMENT)).sum())

    @property
    def per_byte(self) -> float:
        """Bits per byte."""
        return self.bits / max(1, self.num_bytes)


def bits_per_byte(
    network: torch.nn.Module, rows: PackedRows, *, batch_size: int, max_rows: int | None = None
) -> float:
    """Return a network's bits per byte. The network is in evaluation mode afterwards.

    Args:
        network: Decoder.
        rows: Rows to evaluate on.
        batch_size: Rows of a batch.
        max_rows: If there are more rows, so many of them are used, at equal distances.
    """
    network.eval()
    device = next(network.parameters()).device
    total = Bits()
    with torch.no_grad():
        for inputs, target in _batches(rows, batch_size, max_rows):
            logits = network(torch.from_numpy(inputs).to(device)).float()
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1),
                torch.from_numpy(target).to(device).flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            total.add(float(nats) / math.log(2), target)
    return total.per_byte


class Bigram:
    """The baseline: the probability of a token depends only on the token before it."""

    def __init__(self, corpus: Corpus) -> None:
        """Count all pairs of neighbouring tokens of a corpus."""
        counts = np.zeros(VOCABULARY * VOCABULARY, dtype=np.int64)
        for batch in _batches(PackedRows(corpus, length=_BLOCK), 1, None):
            counts += np.bincount(_pairs(batch), minlength=len(counts))
        smoothed = counts.reshape(VOCABULARY, VOCABULARY) + SMOOTHING
        self._bits = -np.log2(smoothed / smoothed.sum(1, keepdims=True)).ravel()

    def bits_per_byte(self, rows: PackedRows, *, batch_size: int, max_rows: int | None = None) -> float:
        """Return the bits per byte. For arguments see the function `bits_per_byte`."""
        total = Bits()
        for batch in _batches(rows, batch_size, max_rows):
            total.add(float(self._bits[_pairs(batch)].sum()), batch.target)
        return total.per_byte


def _batches(rows: PackedRows, batch_size: int, max_rows: int | None) -> Iterator[Batch]:
    count = len(rows) if max_rows is None else min(len(rows), max_rows)
    for start in range(0, count, batch_size):
        positions = np.arange(start, min(count, start + batch_size), dtype=np.int64)
        yield rows.take(positions * len(rows) // count)


def _pairs(batch: Batch) -> npt.NDArray[np.int64]:
    is_pair = batch.target != IGNORED
    pairs: npt.NDArray[np.int64] = batch.inputs[is_pair] * VOCABULARY + batch.target[is_pair]
    return pairs
