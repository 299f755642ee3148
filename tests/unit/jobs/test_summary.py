"""What the demo's summary says of the prediction log."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl

from cluster.records import SHADOW, SegmentWriter, read_log
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from jobs.pipeline.summary import logged, monitored
from tests.unit.cluster.test_records import prediction


def test_the_demo_counts_its_own_clients_requests(tmp_path: Path) -> None:
    """A person's request that got no answer may be logged all the same; what others asked, or a shadow predicted, is
    neither an answer of the demo nor one that was lost. Answers count once, however many entities they have."""
    keyring = Keyring.create(tmp_path / "keyring.json", bytes(32))
    keyring.ensure(KeyInfo(name="predictions/m/personal"))
    log = tmp_path / "predictions" / "m"
    one = prediction(1)
    unit = "7902699BE42C8A8E"  # as HAProxy has it for 7: sha2(256),hex,bytes(0,16)
    SegmentWriter(log, store=keyring, key="predictions/m/personal").append(
        dataclasses.replace(one, prediction_id="answered"),
        dataclasses.replace(one, prediction_id="again", unit_hash=unit),
        dataclasses.replace(one, prediction_id="lost", unit_hash=unit),
        dataclasses.replace(one, prediction_id="another client's"),
        dataclasses.replace(one, prediction_id="shadowed", arm=SHADOW),
        dataclasses.replace(one, prediction_id="failed", predictions=[], fault="gave no finite score"),
    )
    answers = pl.DataFrame({"person_id": [1, 7, 7], "prediction_id": ["answered", "again", None]})
    found = logged(read_log(log, keyring), answers)
    assert found == {"prediction_log_rows": 3, "orphans": 1, "others": 1, "without_score": 1}


def test_a_variant_is_shown_as_the_version_that_the_demo_served() -> None:
    """Others may have been the variant since; a file of before had no versions."""
    one, two = {"version": 1, "periods": {"2016": 1}}, {"version": 2, "periods": {"2016": 2}}
    output = {"details": {"champion": {"1": one, "2": two}, "other": {"9": one, "10": two}}}
    expected = {
        "variants": {"champion": {"2016": 1}, "other": {"2016": 2}},
        "details": {"champion": one, "other": two},
    }
    assert monitored(output, {"champion": {"version": 1}}) == expected
    assert monitored({"details": {"champion": one}}, {})["variants"] == {"champion": {"2016": 1}}
