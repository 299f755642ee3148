"""Packed rows of a corpus: the documents behind each other, cut into rows of equal length.

A row may begin inside a document and have several documents. The order of the rows depends only on seed, epoch and
position, so any number of processes reads the same batches, and a run continues from a position.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.errors import TrainingSetError
from cluster.storage import file_system
from jobs.train.decoder.corpus import Corpus
from jobs.train.decoder.network import DOCUMENT, IGNORED
from jobs.train.decoder.order import Positions, RandomOrder

Tokens = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Rows of tokens, int64 [rows, length]."""

    inputs: Tokens
    target: Tokens
    """The next token of each input, or `IGNORED` after the last token of the corpus."""

    @property
    def matrix(self) -> Tokens:
        """The inputs, under the name that the training loop uses."""
        return self.inputs


class _Piece(NamedTuple):
    """Bytes of one document that belong into one row."""

    path: str
    start: int
    stop: int
    row: int
    column: int


class PackedRows:
    """The rows of a corpus. Only the rows of the current batch are in memory."""

    def __init__(self, corpus: Corpus, *, length: int, seed: int = 0) -> None:
        """Open a corpus.

        Args:
            corpus: The documents.
            length: Tokens of a row.
            seed: Seed of the rows' order.
        """
        self._corpus, self._length, self._seed = corpus, length, seed
        self._file_system, _ = file_system(corpus.uri)

    def __len__(self) -> int:
        """Return the number of rows."""
        return -(-(self._corpus.num_tokens - 1) // self._length)

    def batch(self, epoch: int, start: int, stop: int) -> Batch:
        """Return the rows at the positions `start` to `stop - 1` of an epoch's random order.

        Raises:
            ValueError: A position is not below the number of rows.
            TrainingSetError: A file has changed.
        """
        return self.take(RandomOrder(len(self), seed=self._seed, epoch=epoch).samples(start, stop))

    def in_order(self, start: int, stop: int) -> Batch:
        """Return the rows `start` to `stop - 1` in the corpus's own order."""
        return self.take(np.arange(start, min(stop, len(self)), dtype=np.int64))

    def take(self, samples: Positions) -> Batch:
        """Return these rows.

        Raises:
            TrainingSetError: A file has changed.
        """
        # One token more than a row has, because the target is the input moved by one.
        tokens = np.full((len(samples), self._length + 1), IGNORED, dtype=np.int64)
        pieces = [
            piece for row, sample in enumerate(samples) for piece in self._pieces(tokens, row, int(sample))
        ]
        paths, starts, stops, *_ = zip(*pieces, strict=True) if pieces else ((), (), ())
        contents = self._file_system.cat_ranges(list(paths), list(starts), list(stops), on_error="raise")
        for piece, content in zip(pieces, contents, strict=True):
            size = piece.stop - piece.start
            if len(content) != size:
                raise TrainingSetError(
                    f"{piece.path} has become shorter since the training began. Start the training again."
                )
            tokens[piece.row, piece.column : piece.column + size] = np.frombuffer(content, np.uint8)
        inputs = np.where(tokens[:, :-1] == IGNORED, DOCUMENT, tokens[:, :-1])
        return Batch(inputs, tokens[:, 1:])

    def _pieces(self, tokens: Tokens, row: int, sample: int) -> list[_Piece]:
        """Write the document tokens of a row, and return which bytes belong between them."""
        first = sample * self._length
        place, end = first, min(first + self._length + 1, self._corpus.num_tokens)
        starts, documents = self._corpus.starts, self._corpus.documents
        number = int(np.searchsorted(starts, place, side="right")) - 1
        pieces = []
        while place < end:
            if place == starts[number]:
                tokens[row, place - first] = DOCUMENT
                place += 1
            stop = min(end, int(starts[number + 1]))
            if place < stop:
                skipped = int(starts[number]) + 1
                path = documents[number].path
                pieces.append(_Piece(path, place - skipped, stop - skipped, row, place - first))
            place, number = stop, number + 1
        return pieces
