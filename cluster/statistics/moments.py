"""Sums over the units of one arm, from which all effects are computed. Sums of several logs can be merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from cluster.statistics.mixtures import FloatArray, Numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Number of units, means, and sums of squared deviations. All fields have the same shape, for example ().

    Each unit gives one `value`. It also gives a `second` number: the denominator of a ratio, or the covariate of CUPED.
    Without either it is 0. Sums of deviations keep their precision if the mean is much greater than the deviations.
    """

    units: Numbers = 0
    mean: Numbers = 0.0
    squares: Numbers = 0.0
    """Sum of (value - mean)²."""
    second_mean: Numbers = 0.0
    second_squares: Numbers = 0.0
    """Sum of (second - second_mean)²."""
    products: Numbers = 0.0
    """Sum of (value - mean) * (second - second_mean)."""

    @classmethod
    def of(cls, values: ArrayLike, second: ArrayLike | None = None) -> Self:
        """Return the sums over the last axis.

        Args:
            values: One finite number for each unit.
            second: The second number of each unit, of the same shape.
        """
        value = np.asarray(values, np.float64)
        other = np.zeros(value.shape) if second is None else np.asarray(second, np.float64)
        mean, second_mean = _mean(value), _mean(other)
        deviation, second_deviation = value - mean[..., None], other - second_mean[..., None]
        return cls(
            units=np.full(value.shape[:-1], value.shape[-1]),
            mean=mean,
            squares=(deviation**2).sum(-1),
            second_mean=second_mean,
            second_squares=(second_deviation**2).sum(-1),
            products=(deviation * second_deviation).sum(-1),
        )

    def merge(self, other: Moments) -> Moments:
        """Return the sums over the units of both. No unit may be in both.

        Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances".
        """
        units = np.maximum(self.units + other.units, 1)
        gap, second_gap = other.mean - self.mean, other.second_mean - self.second_mean
        weight, share = self.units * other.units / units, other.units / units
        return Moments(
            units=self.units + other.units,
            mean=self.mean + gap * share,
            squares=self.squares + other.squares + gap**2 * weight,
            second_mean=self.second_mean + second_gap * share,
            second_squares=self.second_squares + other.second_squares + second_gap**2 * weight,
            products=self.products + other.products + gap * second_gap * weight,
        )


def _mean(values: FloatArray) -> FloatArray:
    """Return the mean over the last axis; 0 if it is empty."""
    return np.asarray(values.sum(-1) / max(values.shape[-1], 1), np.float64)
