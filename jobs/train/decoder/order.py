"""A random order of samples that needs no memory: a permutation that is computed for one position at a time.

A stored permutation of a billion samples would need eight gigabytes in each process. This one is a Feistel network: its
rounds are invertible, so each position has a sample of its own, whatever the round function is (Luby & Rackoff 1988).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 8


class RandomOrder:
    """The order of `size` samples in one epoch. Seed and epoch decide it."""

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        self._size = size
        bits = max(1, -(-max(1, size - 1).bit_length() // 2))  # of each half
        self._shift, self._mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)

    def samples(self, start: int, stop: int) -> Positions:
        """Return the samples at the positions `start` to `stop - 1`, int64 [stop - start].

        Raises:
            ValueError: A position is not below `size`.
        """
        if not 0 <= start <= stop <= self._size:
            raise ValueError(f"Positions {start} to {stop} are not within 0 to {self._size}.")
        samples = self._permute(np.arange(start, stop, dtype=np.uint64))
        # The network permutes up to four times as many numbers. A number that is no sample is permuted again, until it
        # is one ("cycle walking": Black & Rogaway 2002).
        while (outside := samples >= self._size).any():
            samples[outside] = self._permute(samples[outside])
        return samples.astype(np.int64)

    def _permute(self, numbers: _Words) -> _Words:
        left, right = numbers >> self._shift, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._shift) | right


def _mix(words: _Words) -> _Words:
    """Return a hash of each word: the last step of SplitMix64 (Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
