"""Monitoring on data whose truth is known: the packaged census, NannyML's own sets, and drift planted in them."""

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
from jobs.monitor.chunks import CHUNK, MAX_REFERENCE_CHUNKS, MIN_REFERENCE_CHUNKS, cut, reference_chunks
from jobs.monitor.config import Period
from jobs.monitor.frames import MISSING, PREDICTED, PROBABILITY, SCORE, TIME, TRUTH, Frames, build
from jobs.monitor.measures import drift, estimated, realised
from jobs.monitor.plots import performance_plot
from tests.unit.jobs.census_frames import MIN_OUTCOMES, YEARS, data, days, distances, of_2018


def test_realised_auc_is_the_one_scikit_learn_gives(census: Frames) -> None:
    """Per year, over the served rows."""
    by_year = census.served.groupby(TIME)
    expected = dict(zip(YEARS, (roc_auc_score(rows[TRUTH], rows[SCORE]) for _, rows in by_year), strict=True))
    measured = {year: one.value for year, one in realised(census, min_outcomes=MIN_OUTCOMES).measures.items()}
    assert measured == pytest.approx(expected, abs=1e-4)


def test_estimated_auc_is_near_the_realised_one(census: Frames) -> None:
    """The census has no concept drift, so the estimate must hold: the reference model's AUC is about 0.90."""
    truth = realised(census, min_outcomes=MIN_OUTCOMES).measures
    estimates = estimated(census).measures
    assert list(estimates) == list(YEARS)
    for year, one in estimates.items():
        assert one.value == pytest.approx(truth[year].value, abs=0.015)
        assert one.lower is not None
        assert one.upper is not None
        assert one.lower < one.value < one.upper
        assert 0.88 < one.value < 0.92
        assert not one.alert


def test_estimate_does_not_need_or_use_outcomes(census: Frames) -> None:
    """The same figures with every outcome withheld."""
    blind = replace(census, served=census.served.assign(**{TRUTH: np.nan}))
    assert estimated(blind) == estimated(census)
    found = realised(blind, min_outcomes=MIN_OUTCOMES)
    assert found.measures == {}
    assert found.reasons == dict.fromkeys(YEARS, f"too few outcomes: 0 of {MIN_OUTCOMES}")


def test_realised_performance_uses_only_rows_with_outcomes(census: Frames) -> None:
    """Outcomes of a quarter of 2018, and of too few people of 2017 to say anything."""
    keep = (of_2018(census) & (np.arange(len(census.served)) % 4 == 0)).to_numpy()
    expected = roc_auc_score(census.served[TRUTH][keep], census.served[SCORE][keep])
    keep[4000 : 4000 + MIN_OUTCOMES - 1] = True
    served = census.served.assign(**{TRUTH: census.served[TRUTH].where(keep)})
    found = realised(replace(census, served=served), min_outcomes=MIN_OUTCOMES)
    measured = found.measures
    assert list(measured) == ["2018"]
    assert found.reasons["2017"] == f"too few outcomes: {MIN_OUTCOMES - 1} of {MIN_OUTCOMES}"
    assert measured["2018"].value == pytest.approx(expected, abs=1e-4)


def test_reference_like_rows_do_not_drift(census: Frames) -> None:
    """Other people of 2015 raise no alert: a control, since an alarm that always rings tells nothing."""
    quarter = census.reference.sample(frac=0.25, random_state=0).assign(**{TIME: pd.Timestamp("2000-01-01")})
    control = replace(census, served=quarter, chunks=["2015"])
    assert not any(one.alert for found in drift(control).values() for one in found.measures.values())


@pytest.mark.parametrize("name", ["AGEP", "SEX"])
def test_planted_drift_is_found_where_it_was_planted(census: Frames, name: str) -> None:
    """People of 2018 made 20 years older, or all of one sex; the other years and columns are left alone."""
    served = census.served.copy()
    served.loc[of_2018(census), name] = served.loc[of_2018(census), name] + 20 if name == "AGEP" else "1"
    before, after = distances(census), distances(replace(census, served=served))
    changed = {
        (column, year) for column in before for year in YEARS if before[column][year] != after[column][year]
    }
    assert changed == {(name, "2018")}
    found = after[name]["2018"]
    assert found.alert
    assert found.upper_threshold is not None
    assert found.value > 2 * found.upper_threshold


def test_concept_drift_shows_in_outcomes_and_not_in_the_estimate(census: Frames) -> None:
    """Outcomes unrelated to the features: why the estimate alone must never decide."""
    shuffled = np.random.default_rng(0).permutation(census.served[TRUTH].to_numpy())
    changed = replace(census, served=census.served.assign(**{TRUTH: shuffled}))
    assert all(one.value > 0.88 and not one.alert for one in estimated(changed).measures.values())
    measured = realised(changed, min_outcomes=MIN_OUTCOMES).measures
    assert list(measured) == list(YEARS)
    assert all(one.value < 0.55 and one.alert for one in measured.values())


def test_regression_is_estimated_by_dle() -> None:
    """NannyML's car prices: the estimated error is near the measured one."""
    reference = _cars("regression_synthetic_reference.csv").head(4000)
    served = _cars("regression_synthetic_analysis.csv")
    served[TRUTH] = pd.read_csv(data("regression_synthetic_analysis_targets.csv"))["y_true"].to_numpy()
    served = served.head(2000)
    frames = Frames(
        task=Task.regression,
        reference=reference.assign(**{TIME: days(len(reference), chunks=10)}),
        served=served.assign(**{TIME: days(len(served), chunks=2)}),
        chunks=["first", "second"],
        continuous=["car_age", "km_driven", "price_new", "accident_count"],
        categorical=["fuel", "transmission"],
    )
    truths, estimates = realised(frames, min_outcomes=MIN_OUTCOMES).measures, estimated(frames).measures
    halves = {"first": served.head(1000), "second": served.tail(1000)}
    for chunk, rows in halves.items():
        assert truths[chunk].value == pytest.approx(mean_squared_error(rows[TRUTH], rows[PREDICTED]) ** 0.5)
        assert estimates[chunk].value == pytest.approx(truths[chunk].value, rel=0.15)


def _cars(name: str) -> pd.DataFrame:
    return pd.read_csv(data(name)).rename(columns={"y_pred": PREDICTED, "y_true": TRUTH})


def test_multiclass_is_estimated_over_all_classes() -> None:
    """NannyML's card choices: three classes, estimated AUC near the realised one."""
    reference = _cards("mc_reference.csv").head(10_000)
    served = _cards("mc_analysis.csv").merge(pd.read_csv(data("mc_analysis_gt.csv")), on="id")
    served = served.rename(columns={"y_true": TRUTH}).head(4000)
    frames = Frames(
        task=Task.multiclass,
        reference=reference.assign(**{TIME: days(len(reference), chunks=10)}),
        served=served.assign(**{TIME: days(len(served), chunks=2)}),
        chunks=["first", "second"],
        continuous=["app_behavioral_score"],
        categorical=[],
    )
    truths, estimates = realised(frames, min_outcomes=MIN_OUTCOMES).measures, estimated(frames).measures
    names = sorted(served[TRUTH].unique())
    for chunk, rows in {"first": served.head(2000), "second": served.tail(2000)}.items():
        scores = rows[[f"{PROBABILITY}{name}" for name in names]].to_numpy()
        expected = roc_auc_score(rows[TRUTH], scores, multi_class="ovr", labels=names)
        assert truths[chunk].value == pytest.approx(expected, abs=1e-3)
        assert estimates[chunk].value == pytest.approx(truths[chunk].value, abs=0.03)


def _cards(name: str) -> pd.DataFrame:
    table = pd.read_csv(data(name))
    prefix = "y_pred_proba_"
    scores = {
        column: f"{PROBABILITY}{column.removeprefix(prefix)}" for column in table.columns if prefix in column
    }
    return table.rename(columns=scores | {"y_pred": PREDICTED, "y_true": TRUTH})


class Third:
    """An engine whose score is a third of its first input."""

    num_inputs = 2

    def scores(self, matrix: Matrix) -> Scores:
        return np.nan_to_num(matrix[:, 0].astype(np.float64) / 3)


def model(*classes: Any) -> Model:
    inputs = (
        InputSpec(name="v__x", dtype="float64"),
        InputSpec(name="v__c", dtype="string", categories=("a", "b")),
    )
    return Model(ModelSignature(task=Task.binary, inputs=inputs, label="y", classes=classes), Third())


def test_frames_score_the_reference_anew_and_take_served_scores_as_logged() -> None:
    """The reference's scores come from the version itself; what was served is not predicted again."""
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
    frames = build(model=model("no", "yes"), reference=reference, served=served, label="y")
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
def test_an_outcome_means_its_class_however_json_wrote_it(outcome: object) -> None:
    """1, 1.0, true and "1" are the class 1."""
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
    frames = build(model=model(0, 1), reference=reference, served=served, label="y")
    assert frames.served[TRUTH].to_list() == [1]


def test_a_reference_without_the_label_is_refused() -> None:
    """With the name that was meant."""
    served = pl.DataFrame(
        {"v__x": [1.0], "v__c": ["b"], "probability": [0.2], "label": [0], "outcome": [1], CHUNK: [""]}
    )
    with pytest.raises(TrainingSetError, match="no column 'employd'"):
        build(model=model(0, 1), reference=pl.DataFrame({"employed": [1]}), served=served, label="employd")


@pytest.mark.parametrize(
    ("period", "names"),
    [
        (Period.year, ["2016"] * 3 + ["2017"] * 2),
        (Period.month, ["2016-12"] * 3 + ["2017-01"] * 2),
        (Period.day, ["2016-12-31"] * 3 + ["2017-01-01"] * 2),
    ],
)
def test_served_rows_are_cut_by_their_own_time(period: Period, names: list[str]) -> None:
    """In order of `as_of`, in UTC, to the last microsecond of the year."""
    last, first = pd.Timestamp("2016-12-31T23:59:59.999999Z"), pd.Timestamp("2017-01-01T00:00:00Z")
    served = pl.DataFrame({"as_of": pl.Series([first, last, last, first, last])})
    assert cut(served, period, min_rows=1)[CHUNK].to_list() == names
    assert cut(served, period, min_rows=3)[CHUNK].to_list() == names[:3]


@given(rows=st.integers(1, 3000), served=st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_reference_is_cut_into_equal_parts(rows: int, served: list[int]) -> None:
    """In order, none empty while there are rows enough, sizes at most one apart, within the bounds."""
    chunks = reference_chunks(rows, served_rows=served)
    sizes = np.bincount(chunks)
    assert len(chunks) == rows
    assert (np.diff(chunks) >= 0).all()
    assert len(sizes) <= MAX_REFERENCE_CHUNKS
    if rows >= MAX_REFERENCE_CHUNKS:
        assert len(sizes) >= MIN_REFERENCE_CHUNKS
        assert sizes.max() - sizes.min() <= 1


def test_plot_holds_every_period_and_leaves_out_what_is_not_known(census: Frames) -> None:
    """One circle a year; a square only where outcomes are in; a year without an estimate stays empty."""
    estimate = asdict(estimated(census).measures["2016"])
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


def test_plot_holds_a_variant_as_text() -> None:
    """A log of an older release holds what a client called it."""
    plot = performance_plot(
        '"><script>x</script>', {"2016": {"estimate": None, "realisation": None}}, metric="auc"
    )
    assert "<script>" not in plot
    assert "&lt;script&gt;" in plot
