"""Accuracy of HyperLogLog estimates, and merging of registers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from feature_jobs.store.aggregation.hyperloglog import REGISTERS, estimate, registers_of

SETS = 20
STANDARD_ERROR = 1.04 / math.sqrt(REGISTERS)


@pytest.mark.parametrize("size", [100, 2_000, 20_000])
def test_error_is_within_the_stated_one(size: int) -> None:
    """The root mean square error of small, medium and large sets is within 1.5 times the standard error of 1.6 %."""
    samples = np.random.default_rng(size).integers(0, 2**62, (SETS, size))
    errors = [estimate(registers_of(numbers.tolist())) / size - 1 for numbers in samples]
    assert math.sqrt(sum(error**2 for error in errors) / SETS) < 1.5 * STANDARD_ERROR
    assert abs(sum(errors) / SETS) < 4 * STANDARD_ERROR / math.sqrt(SETS)


def test_registers_of_parts_merge_to_those_of_the_whole() -> None:
    """In any order, with repetitions."""
    words = [f"word {number}" for number in range(3_000)]
    merged = np.maximum(registers_of(words[:2_000]), registers_of(words[1_000:] + words[1_000:]))
    assert estimate(merged) == estimate(registers_of(reversed(words)))
