"""Each figure of the monitor fails alone: it has a reason instead of a value, and raises no alert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from jobs.monitor.calculation.combining import small_chunk
from jobs.monitor.calculation.drift import measure_drift
from jobs.monitor.calculation.figures import compute_figures
from jobs.monitor.calculation.frames import MISSING, PREDICTED, SCORE, TIME, TRUTH, Frames
from jobs.monitor.calculation.measures import Figure, Measures
from jobs.monitor.calculation.performance import estimate_performance, realised_performance
from jobs.monitor.calculation.shares import missing_shares, unseen_shares
from jobs.monitor.chunks import CHUNK
from jobs.monitor.logged import ServedVersion
from jobs.monitor.report import alerting_chunks, describe
from jobs.monitor.run import result_name
from tests.unit.jobs.census_frames import MIN_OUTCOMES, YEARS, of_2018


def alerts(shares: Mapping[str, Measures]) -> dict[str, list[str]]:
    """Return the chunks with an alert by column, as the job reports them."""
    return alerting_chunks(
        {
            name: {chunk: asdict(measure) for chunk, measure in by_chunk.items()}
            for name, by_chunk in shares.items()
        }
    )


def test_a_column_without_values_has_no_distance_but_an_alert(census: Frames) -> None:
    """An input that is null in a whole year. Other figures are not affected."""
    without_2018 = census.served["AGEP"].where(~of_2018(census))
    frames = replace(census, served=census.served.assign(AGEP=without_2018))
    drift = measure_drift(frames)
    assert list(drift["AGEP"].measures) == ["2016", "2017"]
    assert drift["AGEP"].reasons == {"2018": "undefined: no values in this chunk"}
    assert alerts(missing_shares(frames)) == {"AGEP": ["2018"]}
    assert missing_shares(frames)["AGEP"]["2018"].value == 1.0
    assert alerts(missing_shares(census)) == {}
    assert list(drift["SEX"].measures) == list(YEARS)


@pytest.mark.parametrize(("share", "is_alert"), [(0.0, False), (0.0002, False), (0.02, True)])
def test_an_unusual_share_of_nulls_is_an_alert(census: Frames, share: float, is_alert: bool) -> None:
    """The reference has no nulls. One null in 4,000 rows is no alert; two in a hundred are."""
    nulls = pd.Series(np.arange(len(census.served)) % 4000 < share * 4000, index=census.served.index)
    served = census.served.assign(
        AGEP=census.served["AGEP"].mask(nulls), SEX=census.served["SEX"].mask(nulls, MISSING)
    )
    expected = {"AGEP": list(YEARS), "SEX": list(YEARS)} if is_alert else {}
    assert alerts(missing_shares(replace(census, served=served))) == expected


def test_unknown_values_are_an_alert(census: Frames) -> None:
    """There is an alert only in the year with the unknown values. A null is not an unknown value."""
    known = {name: frozenset(map(str, census.reference[name].unique())) for name in ("MAR", "SEX")}
    served = census.served.assign(
        MAR=census.served["MAR"].mask(of_2018(census), "married in space"),
        SEX=census.served["SEX"].mask(of_2018(census), MISSING),
    )
    shares = unseen_shares(replace(census, served=served, known=known))
    assert alerts(shares) == {"MAR": ["2018"]}
    assert shares["MAR"]["2018"].value == 1.0


def test_a_chunk_with_one_class_fails_alone(census: Frames) -> None:
    """Its realised performance is undefined. The other years and the estimates do not change."""
    served = census.served.assign(**{TRUTH: census.served[TRUTH].where(~of_2018(census), 1)})
    before, after = (
        realised_performance(frames, min_outcomes=MIN_OUTCOMES)
        for frames in (census, replace(census, served=served))
    )
    assert after.reasons == {"2018": "undefined: one class in this chunk"}
    assert after.measures == {year: before.measures[year] for year in ("2016", "2017")}
    assert list(estimate_performance(replace(census, served=served)).measures) == list(YEARS)


@pytest.mark.parametrize(
    ("rows", "fault"), [(0, "no rows of positive class"), (1, "1 row of positive class")]
)
def test_a_reference_without_a_class_gives_no_estimate_and_no_threshold(
    census: Frames, rows: int, fault: str
) -> None:
    """So there is no alert. Realised performance and drift are still measured."""
    truth = np.zeros(len(census.reference))
    truth[:rows] = 1
    frames = replace(census, reference=census.reference.assign(**{TRUTH: truth}))
    assert estimate_performance(frames) == Figure(
        reasons=dict.fromkeys(YEARS, f"undefined: the reference has {fault}")
    )
    realised = realised_performance(frames, min_outcomes=MIN_OUTCOMES)
    expected = realised_performance(census, min_outcomes=MIN_OUTCOMES).measures
    assert values(realised.measures) == pytest.approx(values(expected))
    assert not any(measure.alert for measure in realised.measures.values())
    assert all(reason.startswith("no threshold: ") for reason in realised.reasons.values())
    assert list(realised.reasons) == list(YEARS)
    assert list(measure_drift(frames)["SEX"].measures) == list(YEARS)


def test_reference_rows_without_a_score_or_a_label_are_ignored(census: Frames) -> None:
    """A few such rows hardly change the estimate."""
    reference = census.reference.assign(**{TRUTH: census.reference[TRUTH].astype(object)})
    reference.loc[reference.index[3], SCORE] = np.nan
    reference.loc[reference.index[4], TRUTH] = None
    estimates = estimate_performance(replace(census, reference=reference)).measures
    expected = estimate_performance(census).measures
    assert values(estimates) == pytest.approx(values(expected), abs=1e-3)


def test_an_input_missing_from_the_reference_does_not_affect_the_others(census: Frames) -> None:
    """The model cannot score such a reference, so there is no estimate and no threshold, each with a reason."""
    reason = "the model cannot read the reference: Input 'AGEP' is missing."
    reference = census.reference.drop(columns=["AGEP", SCORE, PREDICTED])
    frames = replace(
        census,
        reference=reference,
        continuous=[],
        unusable={"AGEP": "absent in the reference"},
        reference_fault=reason,
    )
    assert estimate_performance(frames).reasons == dict.fromkeys(YEARS, f"undefined: {reason}")
    assert realised_performance(frames, min_outcomes=MIN_OUTCOMES).reasons == dict.fromkeys(
        YEARS, f"no threshold: {reason}"
    )
    figures = compute_figures(frames, served_rows(frames), min_outcomes=MIN_OUTCOMES)
    assert list(figures["undefined"]) == [
        "estimated_auc",
        "realised_auc",
        "drift of AGEP",
        f"drift of {SCORE}",
    ]
    assert list(figures["drift"]["SEX"]) == list(YEARS)
    assert figures["undefined"]["drift of AGEP"]["2016"] == "undefined: absent in the reference"
    lines = describe(
        "champion v2", figures | {"metric": "auc", "status": "measured", "left_out": {"odd_outcomes": 3}}
    )
    assert lines[0].startswith("champion v2: auc estimated / realised: 2016 unknown / 0.9")
    assert f"champion v2: estimated_auc 2016, 2017, 2018: undefined: {reason}" in lines
    assert lines[-1] == "champion v2: in no figure: odd outcomes 3"


def values(measures: Measures) -> dict[str, float]:
    """Return the values by chunk."""
    return {chunk: measure.value for chunk, measure in measures.items()}


def served_rows(frames: Frames) -> pl.DataFrame:
    """Return the served rows as they come from the log, with their chunk."""
    chunks = [frames.chunks[(day - pd.Timestamp("2000-01-01")).days] for day in frames.served[TIME]]
    return pl.DataFrame({CHUNK: chunks, "outcome": frames.served[TRUTH].to_numpy()})


def test_chunks_below_min_rows_are_reported() -> None:
    """They have no figures, but a reason."""
    rows = pl.DataFrame({CHUNK: ["2017"], "outcome": [1]})
    figures = small_chunk("2017", rows, metric="auc", min_rows=2)
    assert (figures["periods"]["2017"]["rows"], figures["periods"]["2017"]["outcomes"]) == (1, 1)
    reason = {"2017": "chunk below min_rows: 1 of 2"}
    assert figures["undefined"] == {"estimated_auc": reason, "realised_auc": reason, "drift": reason}


def test_each_variant_has_its_own_valid_file_name() -> None:
    """In the log of an older release, the variant may be any text of a client: a path, or too long for a file name."""
    version: Any = SimpleNamespace(version=2)
    variants = ["a", "../zz", "é" * 300, "é" * 301]
    names = [result_name(ServedVersion(variant=variant, version=version, failed=0)) for variant in variants]
    assert names[:2] == ["a-v2", "%2E.%2Fzz-v2"]
    assert len(set(names)) == len(names)
    assert all(len(name) < 200 and "/" not in name for name in names)
