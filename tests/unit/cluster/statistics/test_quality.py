"""Quality metrics of rows, and their mean per unit."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from cluster.statistics.quality import (
    PairedConditions,
    accuracy,
    brier,
    failed_conditions,
    squared_error,
    unit_means,
)


def test_binary_brier_is_that_of_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    probabilities, outcomes = draw.random(200), draw.integers(0, 2, 200)
    assert brier(probabilities, outcomes).mean() == pytest.approx(brier_score_loss(outcomes, probabilities))


def test_multiclass_brier_is_the_squared_distance_from_the_true_class() -> None:
    """With two classes it is twice the binary score."""
    probabilities = np.array([[0.2, 0.5, 0.3], [0, 0, 1]])
    assert brier(probabilities, [1, 2]).tolist() == pytest.approx([0.04 + 0.25 + 0.09, 0])
    assert brier([[0.3, 0.7]], [1]) == pytest.approx(2 * brier([0.7], [1]))


@pytest.mark.parametrize("prediction", [np.inf, -np.inf, np.nan, 1e200])
def test_huge_error_counts_as_the_limit(prediction: float) -> None:
    """One such answer must not make the variance infinite, because then no harm could be proven."""
    assert squared_error([prediction, 3.0], [1.0, 1.0], limit=100).tolist() == [100, 4]


def test_accuracy_is_one_for_the_true_class() -> None:
    assert accuracy([0, 1, 2], [0, 2, 2]).tolist() == [1, 0, 1]


def test_unit_with_many_rows_has_one_value() -> None:
    units, means = unit_means(["b", "a", "b", "b"], [1.0, 5.0, 0.0, 0.5])
    assert (units.tolist(), means.tolist()) == (["a", "b"], [5, 0.5])


def test_paired_comparison_names_the_conditions_that_do_not_hold() -> None:
    """Otherwise the newer model could have seen the answers."""
    holds = PairedConditions(
        outcomes_independent_of_predictions=True,
        requests_after_training_data=False,
        features_as_of_request=True,
        one_value_per_unit=False,
    )
    assert failed_conditions(holds) == ("requests_after_training_data", "one_value_per_unit")
