"""The batches of a corpus for the training loop, like those of a training set (`jobs.train.rows.batches`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jobs.train.decoder.corpus import Parts
from jobs.train.decoder.rows import Batch, PackedRows

EVALUATION_ROWS = 32
"""Rows of a batch in which a decoder is evaluated. A row has many tokens, each with a score for each next token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBatches:
    """The documents to fit on and to validate on, as plain data for workers."""

    parts: Parts
    length: int
    """Tokens of a row."""

    @property
    def num_rows(self) -> int:
        """Number of rows to fit on."""
        return len(PackedRows(self.parts.fit, length=self.length))

    def reader(self, *, seed: int) -> TextReader:
        """Return a reader for one worker."""
        return TextReader(self, seed=seed)


class TextReader:
    """Reads the batches of one rank. It holds one batch."""

    def __init__(self, batches: TextBatches, *, seed: int) -> None:
        self._fit = PackedRows(batches.parts.fit, length=batches.length, seed=seed)
        self._validation = PackedRows(batches.parts.validation, length=batches.length)

    def batches(self, epoch: int, *, first_step: int, steps: int, batch_rows: int) -> Iterator[Batch]:
        """Yield the global batches of the steps `first_step` to `steps` of an epoch."""
        for step in range(first_step, steps):
            yield self._fit.batch(epoch, step * batch_rows, (step + 1) * batch_rows)

    def validation(self, *, rank: int, workers: int) -> Iterator[Batch]:
        """Yield the validation rows that belong to this rank."""
        for start in range(rank * EVALUATION_ROWS, len(self._validation), workers * EVALUATION_ROWS):
            yield self._validation.in_order(start, start + EVALUATION_ROWS)

    def validation_steps(self, *, workers: int) -> int:
        """Return the largest number of validation batches of a rank."""
        return -(-len(self._validation) // (EVALUATION_ROWS * workers))

    def any_batch(self) -> Batch:
        """Return a batch whose values do not matter."""
        return self._validation.in_order(0, 1)
