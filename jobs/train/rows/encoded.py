"""Rows of a training set as a model sees them: an encoded matrix, a target, and the part of the split of each row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from cluster.errors import TrainingSetError
from cluster.runtime import ModelSignature
from cluster.runtime.encoding import Encoder, Matrix
from jobs.train.rows.file import RowGroups
from jobs.train.rows.target import Target, encode_target

Parts = npt.NDArray[np.uint8]
"""For each row of a training set, its `Part`."""


class Part(IntEnum):
    """What a row is used for."""

    unused = 0
    """The row is not a training row, because its outcome may still change."""
    fit = 1
    validation = 2
    held_out = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedGroup:
    """The rows of one row group."""

    matrix: Matrix
    """float32 [rows, inputs]; missing values are NaN."""
    target: Target
    parts: Parts

    @property
    def digest(self) -> str:
        """Hash of the values."""
        content = hashlib.blake2b(np.ascontiguousarray(self.matrix).data, digest_size=16)
        content.update(np.ascontiguousarray(self.target).data)
        return content.hexdigest()

    def of(self, part: Part) -> EncodedGroup:
        """Return the rows of one part."""
        mask = self.parts == part
        return EncodedGroup(matrix=self.matrix[mask], target=self.target[mask], parts=self.parts[mask])


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRows:
    """A training set with what is needed to encode it. It is plain data for workers."""

    rows: RowGroups
    signature: ModelSignature
    parts: Parts
    replaced_target: Target | None = None
    """Target of all rows, instead of the file's label."""
    digests: tuple[str, ...] = field(default=(), repr=False)
    """Hash of each group, if known. A group that differs is refused: the file was replaced after it was checked."""

    def counts(self, part: Part) -> list[int]:
        """Return the number of rows of a part in each group."""
        return [int((self.parts[begin:end] == part).sum()) for begin, end in self.bounds()]

    def bounds(self) -> list[tuple[int, int]]:
        """Return the first row of each group, and the row behind its last one."""
        ends = np.cumsum(self.rows.group_sizes).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def read(self, group: int) -> EncodedGroup:
        """Read and encode one group.

        Raises:
            TrainingSetError: The group differs from the one that was checked.
        """
        signature = self.signature
        table = self.rows.read(group, [*signature.columns, signature.label])
        begin, end = self.bounds()[group]
        if self.replaced_target is not None:
            target = self.replaced_target[begin:end]
        else:
            labels = table[signature.label]
            target = encode_target(signature.task, labels, classes=signature.classes, label=signature.label)
        encoded = EncodedGroup(matrix=Encoder(signature)(table), target=target, parts=self.parts[begin:end])
        if self.digests and self.replaced_target is None and encoded.digest != self.digests[group]:
            raise TrainingSetError("The training set was changed while the job ran. Run the job again.")
        return encoded

    def groups(self) -> Iterator[EncodedGroup]:
        """Read and encode one group after another."""
        for group in range(len(self.rows.group_sizes)):
            yield self.read(group)


CACHE_BYTES = 48 * 2**20
"""A worker keeps encoded groups up to this size, so that epochs of a small training set decrypt it once."""


class GroupCache:
    """Reads encoded groups, and keeps the first ones.

    Each epoch reads all groups once. If they do not all fit, the groups that were used last are not used again soon, so
    no group makes room for another one.
    """

    def __init__(self, rows: EncodedRows, *, max_bytes: int = CACHE_BYTES) -> None:
        self._rows, self._room = rows, max_bytes
        self._groups: dict[int, EncodedGroup] = {}

    def read(self, group: int) -> EncodedGroup:
        """Return one group."""
        kept = self._groups.get(group)
        if kept is not None:
            return kept
        encoded = self._rows.read(group)
        size = _size(encoded)
        if size <= self._room:
            self._groups[group] = encoded
            self._room -= size
        return encoded


def _size(group: EncodedGroup) -> int:
    """Return the bytes of a group's values."""
    return int(group.matrix.nbytes + group.target.nbytes)
