"""Fairness, threshold, requirements, robustness and attributions on models of which the answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import RefusedError
from cluster.runtime import InputSpec, Model, ModelSignature, Task, open_model
from cluster.runtime.encoding import Matrix
from jobs.evaluate.attributions import SAMPLING, SHAP, AttributionConfig, attribute
from jobs.evaluate.bootstrap import intervals
from jobs.evaluate.fairness import OPPORTUNITY, PARITY, difference_statistic, group_rates, with_intervals
from jobs.evaluate.requirements import RequireConfig, check_requirements, require_met
from jobs.evaluate.robustness import RobustnessConfig, measure_robustness
from jobs.evaluate.rows import ScoredRows
from jobs.evaluate.threshold import CostConfig, Costs, cheapest_threshold, choose_threshold
from tests.samples.network import rows, write_network
from tests.samples.trees import write_trees

SIGNATURE = ModelSignature(
    task=Task.binary,
    inputs=(
        InputSpec(name="age", dtype="double"),
        InputSpec(name="vector", dtype="float", length=2),
        InputSpec(name="town", dtype="string", categories=("a", "b", "c")),
    ),
    label="y",
    classes=(0, 1),
)


def test_differences_between_groups_are_known() -> None:
    """Group a: 3 of 4 are selected; group b: 1 of 4. Of the positives, 2 of 2 in a and 1 of 2 in b are selected."""
    values = np.array(["a"] * 4 + ["b"] * 4 + ["few"])
    selected = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1], bool)
    positive = np.array([1, 1, 0, 0, 1, 1, 0, 0, 1], bool)
    rates = group_rates(selected, positive, values, min_rows=2)
    assert rates[PARITY] == 0.5
    assert rates[OPPORTUNITY] == 0.5
    assert rates["groups"]["few"]["judged"] is False
    statistic = difference_statistic("g", rates, selected, positive, values)
    assert {name.partition("\x1f")[2]: value[0] for name, value in statistic(np.ones((1, 9))).items()} == {
        PARITY: 0.5,
        OPPORTUNITY: 0.5,
    }
    found = with_intervals(
        {"g": rates}, intervals([statistic], np.arange(9), replicates=100, level=0.5, seed=0)
    )
    low, high = found["g"][f"{PARITY}_interval"]
    assert 0 <= low <= high <= 1


def test_one_group_has_no_difference() -> None:
    """A difference needs two groups with enough rows."""
    few = np.array([True, False])
    rates = group_rates(few, few, np.array(["a", "b"]), min_rows=2)
    assert rates[PARITY] is None
    assert rates[OPPORTUNITY] is None


def test_the_threshold_has_the_lowest_cost() -> None:
    """Compared with the cost of each possible threshold."""
    draw = np.random.default_rng(0)
    scores = draw.random(200)
    target = (draw.random(200) < scores).astype(np.int64)
    for cost in (Costs(1, 1), Costs(1, 10), Costs(10, 1), Costs(1, 1000)):
        chosen = cheapest_threshold(scores, target, cost)

        def total(threshold: float, cost: Costs = cost) -> float:
            selected = scores >= threshold
            missed, alarms = (~selected & (target == 1)).sum(), (selected & (target == 0)).sum()
            return float(cost.false_negative * missed + cost.false_positive * alarms)

        assert total(chosen) == min(total(one) for one in [0.0, *scores, 2.0])
        assert 0 < chosen < 1


def test_the_evaluated_rows_do_not_choose_the_threshold() -> None:
    """They only show its cost. Here the validation rows are misleading, so the chosen threshold costs more."""
    validation = np.array([0.1, 0.9]), np.array([1, 1])
    evaluated = np.array([0.1, 0.9]), np.array([0, 1])
    result = choose_threshold(validation, evaluated, Costs(1, 1), current=0.5)
    assert result["chosen"] < 0.1
    assert (result["cost_of_chosen"], result["cost_of_current"]) == (0.5, 0.0)


def test_half_a_cost_is_refused() -> None:
    """Only the ratio of both costs decides."""
    with pytest.raises(ValueError, match="both costs"):
        CostConfig(false_positive=1)
    with pytest.raises(ValueError, match="positive number"):
        CostConfig(false_positive=1, false_negative=-1)


def test_all_requirements_that_are_not_met_are_named() -> None:
    """A missing value does not meet a bound; a bias is compared without its sign."""
    config = RequireConfig(auc=0.8, ece=0.1, bias=0.2, cost=1.0, accuracy=0.5)
    results = check_requirements(config, {"auc": 0.7, "ece": 0.2, "bias": -0.3, "accuracy": 0.6})
    with pytest.raises(RefusedError, match="m version 1") as refused:
        require_met(results, model="m version 1")
    for text in (
        "auc is 0.7, required is at least 0.8",
        "ece is 0.2, required is at most 0.1",
        "bias is -0.3",
    ):
        assert text in str(refused.value)
    assert "cost is undefined" in str(refused.value)
    assert "accuracy" not in str(refused.value)
    require_met(check_requirements(RequireConfig(auc=0.7), {"auc": 0.7}), model="m")


class Known:
    """An engine that uses only the first input."""

    num_inputs = 4

    def scores(self, matrix: Matrix) -> np.ndarray:
        return np.where(np.isnan(matrix[:, 0]), 0.5, 1 / (1 + np.exp(-(matrix[:, 0] - 40) / 10))).astype(
            float
        )


def scored(model: Model, count: int = 400) -> ScoredRows:
    matrix = known_rows(count)
    predictions = model.predict_matrix(matrix)
    return ScoredRows(
        table=None, matrix=matrix, predictions=predictions, target=(matrix[:, 0] > 40).astype(np.int64)
    )


def known_rows(count: int) -> Matrix:
    draw = np.random.default_rng(0)
    return np.column_stack([draw.normal(40, 20, (count, 3)), draw.integers(0, 3, count)]).astype(np.float32)


def test_robustness_falls_only_with_the_input_that_matters() -> None:
    """Without the only used input, the AUC is 0.5. Other inputs change nothing."""
    model = Model(SIGNATURE, Known())
    found = measure_robustness(
        model, scored(model), RobustnessConfig(rows=300), important=SIGNATURE.columns, seed=0
    )
    assert found["rows"] == 300
    assert found["unchanged"] == 1.0
    assert found["missing"] == {"age": 0.5, "vector": 1.0, "town": 1.0}
    assert found["shifted"] == {
        "age": 1.0,
        "vector": 1.0,
        "town": 1.0,
    }  # a shift of all rows keeps their order
    assert found["some_missing"]["30%"] < found["some_missing"]["10%"] < 1.0


def test_sampled_attributions_name_the_input_that_matters() -> None:
    """Captum's sampling gives other inputs exactly 0. Missing values are allowed."""
    model = Model(SIGNATURE, Known())
    matrix = known_rows(50)
    matrix[::5] = np.nan
    found = attribute(model, matrix, AttributionConfig(), seed=0)
    assert found["method"] == SAMPLING
    assert list(found["inputs"]) == ["age", "vector", "town"]
    assert found["inputs"]["age"] > 0.1
    assert found["inputs"]["vector"] == found["inputs"]["town"] == 0.0


@pytest.mark.parametrize("task", list(Task))
def test_attributions_of_trees_and_networks_have_all_inputs(tmp_path: Path, task: Task) -> None:
    """For each task. Trees use LightGBM's own contributions."""
    classes = {Task.binary: (0, 1), Task.multiclass: (0, 1, 2), Task.regression: None}[task]
    signature = ModelSignature(
        task=task, inputs=(SIGNATURE.inputs[0], SIGNATURE.inputs[2]), label="y", classes=classes
    )
    write_trees(tmp_path / "trees", signature)
    write_network(tmp_path / "network", signature)
    for folder, method in (("trees", SHAP), ("network", SAMPLING)):
        found = attribute(open_model(tmp_path / folder), rows(signature, 40), AttributionConfig(), seed=0)
        assert found["method"] == method
        assert set(found["inputs"]) == {"age", "town"}
        assert max(found["inputs"].values()) > 0


def test_contributions_of_trees_add_up_to_the_raw_score(tmp_path: Path) -> None:
    """SHAP values of a row and the base value are the raw score."""
    signature = ModelSignature(task=Task.binary, inputs=SIGNATURE.inputs[::2], label="y", classes=(0, 1))
    write_trees(tmp_path / "trees", signature)
    model, matrix = open_model(tmp_path / "trees"), rows(signature, 30)
    sums = model.engine.contributions(matrix).sum(axis=(1, 2))
    probabilities = model.predict_matrix(matrix).scores
    raw = np.log(probabilities / (1 - probabilities))
    assert np.allclose(sums - sums[0], raw - raw[0])
