"""Each figure of the monitor fails alone: with a reason instead of a value, without an alert, and never in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from jobs.monitor.__main__ import figures_of, results_name, with_small
from jobs.monitor.chunks import CHUNK
from jobs.monitor.frames import MISSING, PREDICTED, SCORE, TIME, TRUTH, Frames
from jobs.monitor.logged import Served
from jobs.monitor.measures import Figure, Measures, drift, estimated, realised
from jobs.monitor.said import alerted, describe
from jobs.monitor.shares import missing_shares, unseen_shares
from tests.unit.jobs.census_frames import MIN_OUTCOMES, YEARS, of_2018


def alerts(shares: Mapping[str, Measures]) -> dict[str, list[str]]:
    """As the job says them."""
    return alerted({name: {chunk: asdict(one) for chunk, one in by.items()} for name, by in shares.items()})


def test_a_column_without_values_has_no_distance_and_is_an_alert(census: Frames) -> None:
    """An input that becomes null altogether, in one year or in all: the commonest fault stops nothing else."""
    gone = census.served["AGEP"].where(~of_2018(census))
    frames = replace(census, served=census.served.assign(AGEP=gone))
    found = drift(frames)
    assert list(found["AGEP"].measures) == ["2016", "2017"]
    assert found["AGEP"].reasons == {"2018": "undefined: no values in this chunk"}
    assert alerts(missing_shares(frames)) == {"AGEP": ["2018"]}
    assert missing_shares(frames)["AGEP"]["2018"].value == 1.0
    assert alerts(missing_shares(census)) == {}
    assert list(found["SEX"].measures) == list(YEARS)


@pytest.mark.parametrize(("share", "is_alert"), [(0.0, False), (0.0002, False), (0.02, True)])
def test_a_share_of_nulls_is_an_alert_where_the_reference_does_not_explain_it(
    census: Frames, share: float, is_alert: bool
) -> None:
    """The reference has none at all: a single null in 4,000 rows says nothing yet, two in a hundred do."""
    nulls = pd.Series(np.arange(len(census.served)) % 4000 < share * 4000, index=census.served.index)
    served = census.served.assign(
        AGEP=census.served["AGEP"].mask(nulls), SEX=census.served["SEX"].mask(nulls, MISSING)
    )
    found = alerts(missing_shares(replace(census, served=served)))
    assert found == ({"AGEP": list(YEARS), "SEX": list(YEARS)} if is_alert else {})


def test_values_that_the_model_does_not_know_are_an_alert(census: Frames) -> None:
    """In the year in which they come; a null is none of them."""
    known = {name: frozenset(map(str, census.reference[name].unique())) for name in ("MAR", "SEX")}
    served = census.served.assign(
        MAR=census.served["MAR"].mask(of_2018(census), "married in space"),
        SEX=census.served["SEX"].mask(of_2018(census), MISSING),
    )
    found = unseen_shares(replace(census, served=served, known=known))
    assert alerts(found) == {"MAR": ["2018"]}
    assert found["MAR"]["2018"].value == 1.0


def test_a_chunk_of_one_class_fails_alone(census: Frames) -> None:
    """Its realised figure is undefined and no alert; those of the other years and the estimates are as they were."""
    served = census.served.assign(**{TRUTH: census.served[TRUTH].where(~of_2018(census), 1)})
    before, after = (
        realised(one, min_outcomes=MIN_OUTCOMES) for one in (census, replace(census, served=served))
    )
    assert after.reasons == {"2018": "undefined: one class in this chunk"}
    assert after.measures == {year: before.measures[year] for year in ("2016", "2017")}
    assert list(estimated(replace(census, served=served)).measures) == list(YEARS)


@pytest.mark.parametrize(("rows", "said"), [(0, "no rows of positive class"), (1, "1 row of positive class")])
def test_a_reference_without_a_class_leaves_what_does_not_need_it(
    census: Frames, rows: int, said: str
) -> None:
    """No estimate and no threshold, so no alert; realised performance and drift are measured all the same."""
    truth = np.zeros(len(census.reference))
    truth[:rows] = 1
    frames = replace(census, reference=census.reference.assign(**{TRUTH: truth}))
    assert estimated(frames) == Figure(reasons=dict.fromkeys(YEARS, f"undefined: the reference has {said}"))
    found = realised(frames, min_outcomes=MIN_OUTCOMES)
    expected = realised(census, min_outcomes=MIN_OUTCOMES).measures
    assert {year: one.value for year, one in found.measures.items()} == pytest.approx(
        {year: one.value for year, one in expected.items()}
    )
    assert not any(one.alert for one in found.measures.values())
    assert all(reason.startswith("no threshold: ") for reason in found.reasons.values())
    assert list(found.reasons) == list(YEARS)
    assert list(drift(frames)["SEX"].measures) == list(YEARS)


def test_rows_of_the_reference_without_a_score_or_a_label_are_left_out(census: Frames) -> None:
    """One of them does not end every figure."""
    reference = census.reference.assign(**{TRUTH: census.reference[TRUTH].astype(object)})
    reference.loc[reference.index[3], SCORE] = np.nan
    reference.loc[reference.index[4], TRUTH] = None
    found = estimated(replace(census, reference=reference)).measures
    assert {year: one.value for year, one in found.items()} == pytest.approx(
        {year: one.value for year, one in estimated(census).measures.items()}, abs=1e-3
    )


def test_an_input_that_the_reference_lacks_leaves_the_others(census: Frames) -> None:
    """The model cannot score such a reference: no estimate and no threshold, and a reason for each."""
    reason = "the model cannot read the reference: Input 'AGEP' is missing."
    reference = census.reference.drop(columns=["AGEP", SCORE, PREDICTED])
    frames = replace(
        census,
        reference=reference,
        continuous=[],
        unusable={"AGEP": "absent in the reference"},
        reference_fault=reason,
    )
    assert estimated(frames).reasons == dict.fromkeys(YEARS, f"undefined: {reason}")
    assert realised(frames, min_outcomes=MIN_OUTCOMES).reasons == dict.fromkeys(
        YEARS, f"no threshold: {reason}"
    )
    figures = figures_of(frames, served_rows(frames), min_outcomes=MIN_OUTCOMES)
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


def served_rows(frames: Frames) -> pl.DataFrame:
    """As they come from the log, with their chunk."""
    chunks = [frames.chunks[(day - pd.Timestamp("2000-01-01")).days] for day in frames.served[TIME]]
    return pl.DataFrame({CHUNK: chunks, "outcome": frames.served[TRUTH].to_numpy()})


def test_chunks_below_min_rows_are_named() -> None:
    """They have no figure, and are not left out in silence."""
    rows = pl.DataFrame({CHUNK: ["2016"] * 3 + ["2017"], "outcome": [1, None, 0, 1]})
    found = with_small({"periods": {}, "undefined": {}, "drift": {}}, rows, metric="auc", min_rows=2)
    assert [(chunk, one["rows"], one["outcomes"]) for chunk, one in found["periods"].items()] == [
        ("2016", 3, 2),
        ("2017", 1, 1),
    ]
    said = {"2017": "chunk below min_rows: 1 of 2"}
    assert found["undefined"] == {"estimated_auc": said, "realised_auc": said, "drift": said}


def test_results_of_any_variant_have_a_file_name_of_their_own() -> None:
    """In the log of an older release a variant can be a client's word: a path, or longer than a name may be."""
    version: Any = SimpleNamespace(version=2)
    variants = ["a", "../zz", "é" * 300, "é" * 301]
    names = [
        results_name(Served(variant=one, version=version, rows=pl.DataFrame(), failed=0, odd_inputs={}))
        for one in variants
    ]
    assert names[:2] == ["a-v2", "%2E.%2Fzz-v2"]
    assert len(set(names)) == len(names)
    assert all(len(name) < 200 and "/" not in name for name in names)
