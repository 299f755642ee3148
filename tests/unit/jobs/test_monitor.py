"""Monitoring of data with known outcomes: NannyML's packaged data sets, and drift added to them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_squared_error, roc_auc_score

from cluster.errors import TrainingSetError
from cluster.runtime import InputSpec, Model, ModelSignature, Task
from cluster.runtime.encoding import Matrix
from cluster.runtime.predictions import Scores
from jobs.monitor.calculation.frames import (
    MISSING,
    PREDICTED,
    PROBABILITY,
    SCORE,
    TIME,
    TRUTH,
    Frames,
    build_frames,
)
from jobs.monitor.calculation.performance import estimate_performance, realised_performance
from jobs.monitor.chunks import (
    CHUNK,
    MAX_REFERENCE_CHUNKS,
    MIN_REFERENCE_CHUNKS,
    assign_chunks,
    reference_chunks,
)
from jobs.monitor.config import Period
from jobs.monitor.plots import performance_plot
from tests.unit.jobs.census_frames import MIN_OUTCOMES, YEARS, data, days, distances, of_2018


def test_realised_auc_equals_scikit_learn(census: Frames) -> None:
    """For each year of served rows."""
    by_year = census.served.groupby(TIME)
    expected = dict(zip(YEARS, (roc_auc_score(rows[TRUTH], rows[SCORE]) for _, rows in by_year), strict=True))
    measures = realised_performance(census, min_outcomes=MIN_OUTCOMES).measures
    assert {year: measure.value for year, measure in measures.items()} == pytest.approx(expected, abs=1e-4)


def test_estimated_auc_is_near_the_realised_auc(census: Frames) -> None:
    """The census has no concept drift, so the estimate must be right. The model's AUC is about 0.90."""
    truth = realised_performance(census, min_outcomes=MIN_OUTCOMES).measures
    estimates = estimate_performance(census).measures
    assert list(estimates) == list(YEARS)
    for year, estimate in estimates.items():
        assert estimate.value == pytest.approx(truth[year].value, abs=0.015)
        assert estimate.lower is not None
        assert estimate.upper is not None
        assert estimate.lower < estimate.value < estimate.upper
        assert 0.88 < estimate.value < 0.92
        assert not estimate.alert


def test_estimate_does_not_need_or_use_outcomes(census: Frames) -> None:
    """The estimates are the same without any outcome."""
    no_outcomes = replace(census, served=census.served.assign(**{TRUTH: np.nan}))
    assert estimate_performance(no_outcomes) == estimate_performance(census)
    realised = realised_performance(no_outcomes, min_outcomes=MIN_OUTCOMES)
    assert realised.measures == {}
    assert realised.reasons == dict.fromkeys(YEARS, f"too few outcomes: 0 of {MIN_OUTCOMES}")


def test_realised_performance_uses_only_rows_with_outcomes(census: Frames) -> None:
    """Outcomes of a quarter of the people of 2018, and of too few people of 2017."""
    has_outcome = (of_2018(census) & (np.arange(len(census.served)) % 4 == 0)).to_numpy()
    expected = roc_auc_score(census.served[TRUTH][has_outcome], census.served[SCORE][has_outcome])
    has_outcome[4000 : 4000 + MIN_OUTCOMES - 1] = True
    served = census.served.assign(**{TRUTH: census.served[TRUTH].where(has_outcome)})
    realised = realised_performance(replace(census, served=served), min_outcomes=MIN_OUTCOMES)
    assert list(realised.measures) == ["2018"]
    assert realised.reasons["2017"] == f"too few outcomes: {MIN_OUTCOMES - 1} of {MIN_OUTCOMES}"
    assert realised.measures["2018"].value == pytest.approx(expected, abs=1e-4)


def test_rows_like_the_reference_do_not_drift(census: Frames) -> None:
    """A control: a sample of the people of 2015 raises no alert."""
    quarter = census.reference.sample(frac=0.25, random_state=0).assign(**{TIME: pd.Timestamp("2000-01-01")})
    control = replace(census, served=quarter, chunks=["2015"])
    assert not any(measure.alert for by_chunk in distances(control).values() for measure in by_chunk.values())


@pytest.mark.parametrize("name", ["AGEP", "SEX"])
def test_drift_is_found_only_where_it_was_added(census: Frames, name: str) -> None:
    """People of 2018 become 20 years older, or all of one sex. Other years and columns do not change."""
    served = census.served.copy()
    served.loc[of_2018(census), name] = served.loc[of_2018(census), name] + 20 if name == "AGEP" else "1"
    before, after = distances(census), distances(replace(census, served=served))
    changed = {
        (column, year) for column in before for year in YEARS if before[column][year] != after[column][year]
    }
    assert changed == {(name, "2018")}
    distance = after[name]["2018"]
    assert distance.alert
    assert distance.upper_threshold is not None
    assert distance.value > 2 * distance.upper_threshold


def test_concept_drift_changes_realised_but_not_estimated_performance(census: Frames) -> None:
    """With random outcomes the estimate stays high, so a decision must not depend on the estimate alone."""
    shuffled = np.random.default_rng(0).permutation(census.served[TRUTH].to_numpy())
    changed = replace(census, served=census.served.assign(**{TRUTH: shuffled}))
    estimates = estimate_performance(changed).measures
    assert all(estimate.value > 0.88 and not estimate.alert for estimate in estimates.values())
    realised = realised_performance(changed, min_outcomes=MIN_OUTCOMES).measures
    assert list(realised) == list(YEARS)
    assert all(measure.value < 0.55 and measure.alert for measure in realised.values())


def in_two_chunks(task: Task, *, reference: pd.DataFrame, served: pd.DataFrame, **columns: Any) -> Frames:
    """Return frames whose served rows are two chunks of equal size."""
    return Frames(
        task=task,
        reference=reference.assign(**{TIME: days(len(reference), chunks=10)}),
        served=served.assign(**{TIME: days(len(served), chunks=2)}),
        chunks=["first", "second"],
        **columns,
    )


def test_regression_is_estimated_by_dle() -> None:
    """On NannyML's car prices, the estimated error is near the realised one."""
    reference = _cars("regression_synthetic_reference.csv").head(4000)
    served = _cars("regression_synthetic_analysis.csv")
    served[TRUTH] = pd.read_csv(data("regression_synthetic_analysis_targets.csv"))["y_true"].to_numpy()
    served = served.head(2000)
    frames = in_two_chunks(
        Task.regression,
        reference=reference,
        served=served,
        continuous=["car_age", "km_driven", "price_new", "accident_count"],
        categorical=["fuel", "transmission"],
    )
    realised = realised_performance(frames, min_outcomes=MIN_OUTCOMES).measures
    estimates = estimate_performance(frames).measures
    halves = {"first": served.head(1000), "second": served.tail(1000)}
    for chunk, rows in halves.items():
        expected = mean_squared_error(rows[TRUTH], rows[PREDICTED]) ** 0.5
        assert realised[chunk].value == pytest.approx(expected)
        assert estimates[chunk].value == pytest.approx(realised[chunk].value, rel=0.15)


def _cars(name: str) -> pd.DataFrame:
    return pd.read_csv(data(name)).rename(columns={"y_pred": PREDICTED, "y_true": TRUTH})


def test_multiclass_is_estimated_over_all_classes() -> None:
    """On NannyML's credit cards with three classes, the estimated AUC is near the realised one."""
    reference = _cards("mc_reference.csv").head(10_000)
    served = _cards("mc_analysis.csv").merge(pd.read_csv(data("mc_analysis_gt.csv")), on="id")
    served = served.rename(columns={"y_true": TRUTH}).head(4000)
    frames = in_two_chunks(
        Task.multiclass,
        reference=reference,
        served=served,
        continuous=["app_behavioral_score"],
        categorical=[],
    )
    realised = realised_performance(frames, min_outcomes=MIN_OUTCOMES).measures
    estimates = estimate_performance(frames).measures
    names = sorted(served[TRUTH].unique())
    for chunk, rows in {"first": served.head(2000), "second": served.tail(2000)}.items():
        scores = rows[[f"{PROBABILITY}{name}" for name in names]].to_numpy()
        expected = roc_auc_score(rows[TRUTH], scores, multi_class="ovr", labels=names)
        assert realised[chunk].value == pytest.approx(expected, abs=1e-3)
        assert estimates[chunk].value == pytest.approx(realised[chunk].value, abs=0.03)


def _cards(name: str) -> pd.DataFrame:
    table = pd.read_csv(data(name))
    prefix = "y_pred_proba_"
    scores = {
        column: f"{PROBABILITY}{column.removeprefix(prefix)}" for column in table.columns if prefix in column
    }
    return table.rename(columns=scores | {"y_pred": PREDICTED, "y_true": TRUTH})


class ThirdEngine:
    """Engine whose score is a third of its first input."""

    num_inputs = 2

    def scores(self, matrix: Matrix) -> Scores:
        return np.nan_to_num(matrix[:, 0].astype(np.float64) / 3)


def model(*classes: Any) -> Model:
    inputs = (
        InputSpec(name="v__x", dtype="float64"),
        InputSpec(name="v__c", dtype="string", categories=("a", "b")),
    )
    return Model(ModelSignature(task=Task.binary, inputs=inputs, label="y", classes=classes), ThirdEngine())


def test_the_reference_is_scored_again_and_served_scores_come_from_the_log() -> None:
    """The version scores the reference. Served rows are not predicted again."""
    reference = pl.DataFrame({"v__x": [0.9, 2.4], "v__c": ["a", None], "y": ["no", "yes"]})
    served = pl.DataFrame(
        {
            "v__x": [1.0, None],
            "v__c": ["b", "a"],
            "probability": [0.25, 0.75],
            "label": ["no", "yes"],
            "outcome": ["yes", None],
            CHUNK: ["2016", "2017"],
        }
    )
    frames = build_frames(model=model("no", "yes"), reference=reference, served=served, label="y")
    assert frames.reference[SCORE].to_list() == pytest.approx([0.3, 0.8])
    assert frames.reference[TRUTH].to_list() == [0, 1]
    assert frames.reference["v__c"].to_list() == ["a", MISSING]
    assert frames.served[SCORE].to_list() == [0.25, 0.75]
    assert frames.served[PREDICTED].to_list() == [0, 1]
    assert frames.served[TRUTH].iloc[0] == 1
    assert pd.isna(frames.served[TRUTH].iloc[1])
    assert frames.chunks == ["2016", "2017"]
    assert (frames.continuous, frames.categorical) == (["v__x"], ["v__c"])


@pytest.mark.parametrize("outcome", [1, 1.0, True, "1"])
def test_an_outcome_is_its_class_in_any_json_type(outcome: object) -> None:
    """1, 1.0, true and "1" all are the class 1."""
    reference = pl.DataFrame({"v__x": [0.9], "v__c": ["a"], "y": [0]})
    served = pl.DataFrame(
        {
            "v__x": [1.0],
            "v__c": ["b"],
            "probability": [0.25],
            "label": [0],
            "outcome": [outcome],
            CHUNK: ["2016"],
        }
    )
    frames = build_frames(model=model(0, 1), reference=reference, served=served, label="y")
    assert frames.served[TRUTH].to_list() == [1]


def test_a_reference_without_the_label_is_refused() -> None:
    """The message names the missing column."""
    served = pl.DataFrame(
        {"v__x": [1.0], "v__c": ["b"], "probability": [0.2], "label": [0], "outcome": [1], CHUNK: [""]}
    )
    with pytest.raises(TrainingSetError, match="no column 'employd'"):
        build_frames(
            model=model(0, 1), reference=pl.DataFrame({"employed": [1]}), served=served, label="employd"
        )


@pytest.mark.parametrize(
    ("period", "names"),
    [
        (Period.year, ["2016"] * 3 + ["2017"] * 2),
        (Period.month, ["2016-12"] * 3 + ["2017-01"] * 2),
        (Period.day, ["2016-12-31"] * 3 + ["2017-01-01"] * 2),
    ],
)
def test_served_rows_are_cut_into_chunks_by_as_of(period: Period, names: list[str]) -> None:
    """Rows are sorted by `as_of` in UTC, exact to the last microsecond of the year. Small chunks are dropped."""
    end_of_2016 = pd.Timestamp("2016-12-31T23:59:59.999999Z")
    start_of_2017 = pd.Timestamp("2017-01-01T00:00:00Z")
    times = [start_of_2017, end_of_2016, end_of_2016, start_of_2017, end_of_2016]
    served = pl.DataFrame({"as_of": pl.Series(times)})
    assert assign_chunks(served, period, min_rows=1)[CHUNK].to_list() == names
    assert assign_chunks(served, period, min_rows=3)[CHUNK].to_list() == names[:3]


@given(rows=st.integers(1, 3000), served=st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_reference_is_cut_into_equal_chunks(rows: int, served: list[int]) -> None:
    """Chunks are in order and within the bounds. With enough rows, none is empty and sizes differ by at most one."""
    chunks = reference_chunks(rows, served_rows=served)
    sizes = np.bincount(chunks)
    assert len(chunks) == rows
    assert (np.diff(chunks) >= 0).all()
    assert len(sizes) <= MAX_REFERENCE_CHUNKS
    if rows >= MAX_REFERENCE_CHUNKS:
        assert len(sizes) >= MIN_REFERENCE_CHUNKS
        assert sizes.max() - sizes.min() <= 1


def test_plot_has_every_period_and_only_known_values(census: Frames) -> None:
    """A circle per estimate and a square per realised value. A year without values stays empty."""
    estimate = asdict(estimate_performance(census).measures["2016"])
    known = {"estimate": estimate, "realisation": estimate}
    periods = {
        "2016": known,
        "2017": known | {"realisation": None},
        "2018": {"estimate": None, "realisation": None},
    }
    plot = performance_plot("champion", periods, metric="auc")
    assert plot.count("<circle") == 2
    assert plot.count('<rect class="realised"') == 1
    assert all(f">{year}<" in plot for year in YEARS)


def test_plot_escapes_the_variant() -> None:
    """In the log of an older release, the variant is any text that a client sent."""
    plot = performance_plot(
        '"><script>x</script>', {"2016": {"estimate": None, "realisation": None}}, metric="auc"
    )
    assert "<script>" not in plot
    assert "&lt;script&gt;" in plot
