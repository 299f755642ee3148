"""NannyML is fitted once, and called for each chunk. The results are those of NannyML itself."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cluster.errors import ArtifactTampered
from cluster.runtime import Task
from cluster.security.keys.access import key_store
from jobs.monitor.calculation.drift import DISTANCE, measure_drift
from jobs.monitor.calculation.fit import Fit, fit_reference, open_fit, seal_fit
from jobs.monitor.calculation.frames import PREDICTED, SCORE, TIME, TRUTH, Frames
from jobs.monitor.calculation.nannyml_api import import_nannyml
from jobs.monitor.calculation.performance import estimate_performance, realised_performance
from jobs.monitor.calculation.ranking import rank_alerts
from jobs.monitor.calculation.reconstruction import measure_reconstruction
from jobs.monitor.stored_fits import FitName, typical_rows
from tests.servers.key_broker import running_broker

NUMBERS = ["car_value", "debt_to_income_ratio", "loan_length", "driver_tenure"]
CATEGORIES = ["salary_range", "repaid_loan_on_prev_car", "size_of_downpayment"]
CHUNK_ROWS, CHUNKS = 5000, 10
NAMES = [str(number) for number in range(CHUNKS)]
ESTIMATED = [
    0.970744, 0.971011, 0.971407, 0.971091, 0.971123, 0.961090, 0.961825, 0.961073, 0.962533, 0.961316,
]  # fmt: skip
"""Estimated AUC of each chunk of the analysis, as NannyML's documentation prints it."""


@pytest.fixture(scope="module")
def loans() -> Frames:
    """NannyML's car loans, in chunks of 5,000 rows."""
    reference, analysis, targets = import_nannyml().load_synthetic_car_loan_dataset()
    served = analysis.drop(columns="repaid", errors="ignore").join(targets[["repaid"]])
    return Frames(
        task=Task.binary,
        reference=_frame(reference),
        served=_frame(served),
        chunks=NAMES,
        continuous=NUMBERS,
        categorical=CATEGORIES,
    )


def _frame(rows: pd.DataFrame) -> pd.DataFrame:
    days = pd.Timestamp("2000-01-01") + pd.to_timedelta(np.arange(len(rows)) // CHUNK_ROWS, unit="D")
    columns = {SCORE: rows["y_pred_proba"], PREDICTED: rows["y_pred"], TRUTH: rows["repaid"], TIME: days}
    return rows[NUMBERS].assign(
        **{name: rows[name].astype(str).astype(object) for name in CATEGORIES}, **columns
    )


@pytest.fixture(scope="module")
def fit(loans: Frames) -> Fit:
    """The fit after a round through its stored form."""
    stored: Fit = pickle.loads(pickle.dumps(fit_reference(loans)))  # noqa: S301 - our own
    return stored


def by_chunk(loans: Frames) -> list[Frames]:
    """Return frames of one chunk each, without the reference."""
    return [
        replace(
            loans,
            reference=loans.reference.head(0),
            served=rows.assign(**{TIME: pd.Timestamp("2000-01-01")}),
            chunks=[name],
        )
        for name, (_, rows) in zip(NAMES, loans.served.groupby(TIME), strict=True)
    ]


def test_the_published_auc_of_the_car_loans_is_reproduced(loans: Frames, fit: Fit) -> None:
    """Each chunk is estimated alone."""
    values = [
        estimate_performance(one, fit.estimator).measures[name].value
        for name, one in zip(NAMES, by_chunk(loans), strict=True)
    ]
    assert [round(value, 6) for value in values] == ESTIMATED


def test_chunks_measured_alone_equal_one_call_of_nannyml_bit_for_bit(loans: Frames, fit: Fit) -> None:
    """Estimated and realised AUC, drift of each column, and PCA drift, with a stored fit and without the reference."""
    nannyml = import_nannyml()
    time = {"timestamp_column_name": TIME, "chunk_period": "D"}
    problem = {
        "y_true": TRUTH, "y_pred": PREDICTED, "y_pred_proba": SCORE, "problem_type": "classification_binary",
        "metrics": ["roc_auc"],
    }  # fmt: skip
    inputs = [*NUMBERS, *CATEGORIES]
    # NannyML's sort by time would shuffle rows with equal times.
    times = loans.served[TIME] + pd.to_timedelta(np.arange(len(loans.served)), unit="us")
    served = loans.served.assign(**{TIME: times})
    methods = {"continuous_methods": [DISTANCE], "categorical_methods": [DISTANCE]}
    univariate = nannyml.UnivariateDriftCalculator(column_names=[*inputs, SCORE], **methods, **time)
    expected = {
        "estimated": nannyml.CBPE(**problem, **time).fit(loans.reference).estimate(served),
        "realised": nannyml.PerformanceCalculator(**problem, **time).fit(loans.reference).calculate(served),
        "drift": univariate.fit(loans.reference).calculate(served),
        # Two fits of PCA can differ in the last bit, so both calls use the same one.
        "pca": copy.deepcopy(fit.reconstruction.result).calculate(served),
    }
    tables = {
        name: one.filter(period="analysis").to_df().sort_index(axis="columns")
        for name, one in expected.items()
    }
    for position, (name, frames) in enumerate(zip(NAMES, by_chunk(loans), strict=True)):
        rows = {kind: table.iloc[position] for kind, table in tables.items()}
        estimate = estimate_performance(frames, fit.estimator).measures[name]
        assert estimate.value == rows["estimated"]["roc_auc", "value"]
        assert estimate.upper_threshold == rows["estimated"]["roc_auc", "upper_threshold"]
        realised = realised_performance(frames, fit.calculator, min_outcomes=300).measures[name]
        assert realised.value == rows["realised"]["roc_auc", "value"]
        for column, figure in measure_drift(frames, fit.drift).items():
            assert figure.measures[name].value == rows["drift"][column, DISTANCE, "value"]
            assert figure.measures[name].upper_threshold == rows["drift"][column, DISTANCE, "upper_threshold"]
        reconstruction = measure_reconstruction(frames, fit.reconstruction).measures[name]
        assert reconstruction.value == rows["pca"]["reconstruction_error", "value"]
        assert reconstruction.alert == rows["pca"]["reconstruction_error", "alert"]


def test_a_stored_fit_is_small_and_bound_to_its_version(fit: Fit) -> None:
    """It has no row of the reference. A file under the name of another version is refused."""
    assert fit.frames.reference.empty
    assert len(pickle.dumps(fit)) < 2**20
    name = FitName("m", 1, "abc")
    with running_broker("models/m") as access:
        store = key_store(access)
        data = seal_fit(fit, name, store)
        assert open_fit(data, name, store).frames.continuous == NUMBERS
        with pytest.raises(ArtifactTampered):
            open_fit(data, name._replace(version=2), store)


def test_new_chunks_seldom_change_the_size_of_the_reference_chunks() -> None:
    """Sizes are rounded to a power of two."""
    assert typical_rows([5000] * 10) == typical_rows([5000] * 10 + [4500, 3000]) == 4096


def test_inputs_are_ranked_by_alerts_and_then_by_their_worst_value() -> None:
    """Alerts of all kinds count. Inputs without an alert are not in the ranking."""

    def measure(value: float, alert: bool) -> dict[str, object]:
        return {"value": value, "lower_threshold": None, "upper_threshold": 0.1, "alert": alert}

    figures = {
        "drift": {
            "a": {"1": measure(0.2, True)},
            "b": {"1": measure(0.4, True)},
            "c": {"1": measure(0.0, False)},
        },
        "missing": {"d": {"2": measure(0.3, True), "1": measure(0.2, True)}},
        "unseen": {},
    }
    ranked = rank_alerts(figures)
    assert [(row["column"], row["alerts"], row["kinds"]) for row in ranked] == [
        ("d", 2, ["missing"]),
        ("b", 1, ["drift"]),
        ("a", 1, ["drift"]),
    ]
    assert ranked[0]["chunks"] == ["1", "2"]
    assert ranked[1]["worst"] == pytest.approx(4)
