"""Arms are sticky, never swap with a larger weight, and are as large as their weight."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.rollout.assignment import BUCKETS, Arm, assign, bounds, bucket

UNITS = st.binary(min_size=1, max_size=40)
WEIGHTS = st.floats(0, 50)


@given(st.text(max_size=10), UNITS, WEIGHTS, WEIGHTS)
def test_larger_weight_never_moves_a_unit_between_arms(
    salt: str, unit: bytes, one: float, other: float
) -> None:
    """A unit in an arm stays in it at every larger weight up to 50 %."""
    low, high = sorted((one, other))
    before, after = assign(salt, unit, bounds(low)), assign(salt, unit, bounds(high))
    assert before in (Arm.outside, after)


@given(st.text(max_size=10), UNITS)
def test_bucket_is_stable_and_below_ten_thousand(salt: str, unit: bytes) -> None:
    """The same salt and unit give the same bucket."""
    assert 0 <= bucket(salt, unit) < BUCKETS
    assert bucket(salt, unit) == bucket(salt, unit)


def test_known_buckets_do_not_change() -> None:
    """The hash is a contract with the edge and with analyses of past decisions."""
    assert [bucket("salt", unit) for unit in (b"1", b"alice", "é".encode())] == [7986, 4303, 9885]


@pytest.mark.parametrize("weight", [1.0, 10.0, 20.0, 50.0])
def test_arms_are_as_large_as_their_weight(weight: float) -> None:
    """Over 100,000 units, each arm is within five standard errors of its weight."""
    limits = bounds(weight)
    arms = [assign("s", str(number).encode(), limits) for number in range(100_000)]
    expected = weight / 100
    error = 5 * (expected * (1 - expected) / 100_000) ** 0.5
    for arm in (Arm.treatment, Arm.control):
        assert abs(arms.count(arm) / 100_000 - expected) < error


def test_empty_unit_has_no_arm() -> None:
    """A request without a unit is answered outside any experiment."""
    assert assign("s", b"", bounds(50)) is Arm.none


def test_above_half_the_control_gets_the_rest() -> None:
    """The arms never overlap."""
    limits = bounds(80)
    assert (limits.treatment_below, limits.control_from) == (8000, 8000)


def test_weight_outside_zero_to_hundred_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 100"):
        bounds(101)
