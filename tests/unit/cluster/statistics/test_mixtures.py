"""E-values of shares agree with other packages and with numerical integration, and have mean 1 under the null."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom

from cluster.statistics.mixtures import log_e_above, log_e_below, upper_bound
from cluster.statistics.sample_ratio import CONCENTRATION, log_evidence_of_mismatch

SHARES = json.loads(Path(__file__).with_name("reference.json").read_text())["shares"]
LIMITS = st.floats(0.01, 0.99)


@pytest.mark.parametrize("row", [row for row in SHARES if row["prior"] == 1], ids=str)
def test_both_sides_together_are_the_e_value_of_other_packages(row: dict[str, float]) -> None:
    """A uniform mixture over (0, 1) is the mixture of those below and above the limit. `make_reference.py` wrote it."""
    ones, total, p0 = row["ones"], row["ones"] + row["zeros"], row["p0"]
    below, above = log_e_below(ones, total, p0), log_e_above(ones, total, p0)
    assert np.logaddexp(np.log(p0) + below, np.log1p(-p0) + above) == pytest.approx(row["log_e"], abs=1e-6)


@pytest.mark.parametrize("row", [row for row in SHARES if row["prior"] == CONCENTRATION / 2], ids=str)
def test_mismatch_of_equal_arms_is_the_e_value_of_other_packages(row: dict[str, float]) -> None:
    """The Dirichlet mixture, in closed form."""
    ours = log_evidence_of_mismatch([row["ones"]], [row["zeros"]])
    assert ours == pytest.approx(row["log_e"], abs=1e-6)


@pytest.mark.parametrize(
    ("ones", "total", "p0"), [(7, 7, 0.5), (13, 20, 0.5), (30, 40, 0.6), (200, 300, 0.5)]
)
def test_closed_form_is_the_integral(ones: int, total: int, p0: float) -> None:
    """The average of the likelihood ratio over (p0, 1), by adaptive quadrature."""

    def ratio(p: float) -> float:
        return float(np.exp(ones * np.log(p / p0) + (total - ones) * np.log(max(1 - p, 1e-300) / (1 - p0))))

    average = quad(ratio, p0, 1, limit=500)[0] / (1 - p0)
    assert log_e_above(ones, total, p0) == pytest.approx(np.log(average), abs=1e-9)


PAIRS = [(0, 0), (5, 5), (50, 30), (48_000, 52_000), (3_000, 0), (10**6, 10)]


@pytest.mark.parametrize(("treatment", "control"), PAIRS)
def test_integral_over_steps_is_the_closed_form_if_all_expect_half(treatment: int, control: int) -> None:
    """A share that differs from 1/2 by 1e-13 selects the integral. How the units divide over steps changes nothing."""
    closed = log_evidence_of_mismatch([treatment], [control])
    parts = ([0.25 * units, 0.75 * units] for units in (treatment, control))
    assert log_evidence_of_mismatch(*parts, [0.5, 0.5 + 1e-13]) == pytest.approx(float(closed), abs=1e-6)


@given(st.integers(0, 300), LIMITS)
def test_mean_of_the_e_value_is_one_under_the_null(total: int, p0: float) -> None:
    """Exactly 1 if the share is the limit, less if the share is below it."""
    counts = np.arange(total + 1)
    log_e = log_e_above(counts, total, p0)
    assert np.exp(binom.logpmf(counts, total, p0) + log_e).sum() == pytest.approx(1, abs=1e-6)
    assert np.exp(binom.logpmf(counts, total, p0 / 2) + log_e).sum() <= 1 + 1e-9


@given(st.integers(0, 2_000), st.data(), st.floats(0.001, 0.2))
def test_bound_is_the_smallest_limit_that_is_excluded(total: int, data: st.DataObject, error: float) -> None:
    """A limit just above the bound is excluded, and one just below is not."""
    ones = data.draw(st.integers(0, total))
    bound = float(upper_bound(ones, total, error=error))
    assert ones / max(total, 1) <= bound <= 1
    if bound < 1 - 1e-6:
        assert (
            log_e_below(ones, total, bound + 1e-7) >= -np.log(error) >= log_e_below(ones, total, bound - 1e-7)
        )


def test_bound_without_units_is_one() -> None:
    assert upper_bound([0, 5], [0, 5], error=0.05).tolist() == [1, 1]


def test_far_below_the_limit_there_is_no_evidence_and_no_warning() -> None:
    """The e-value may underflow, which is evidence for health."""
    assert log_e_above(10, 10_000_000, 0.5) < 0
