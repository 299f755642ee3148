"""The demo's summary of the prediction log and of the monitoring output."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl

from cluster.records.reading import read_log
from cluster.records.schema import SHADOW
from cluster.records.segments import SegmentWriter
from cluster.records.unit_hash import unit_hash
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from jobs.pipeline.census.summary import count_logged, select_versions
from tests.samples.record_log import prediction


def test_summary_counts_only_the_requests_of_its_own_client(tmp_path: Path) -> None:
    """A request without an answer may be logged, and counts as an orphan.

    Predictions for other clients and of shadows are neither answers of the demo nor orphans. An answer counts once,
    even with several entities."""
    keyring = Keyring.create(tmp_path / "keyring.json", bytes(32))
    keyring.ensure(KeyInfo(name="predictions/m/personal"))
    log = tmp_path / "predictions" / "m"
    record = prediction(1)
    key = bytes(range(32))
    unit = unit_hash(key, rollout=record.rollout, unit=b"7")
    SegmentWriter(log, store=keyring, key="predictions/m/personal").append(
        dataclasses.replace(record, prediction_id="answered"),
        dataclasses.replace(record, prediction_id="again", unit_hash=unit),
        dataclasses.replace(record, prediction_id="lost", unit_hash=unit),
        dataclasses.replace(record, prediction_id="another client's"),
        dataclasses.replace(record, prediction_id="shadowed", arm=SHADOW),
        dataclasses.replace(record, prediction_id="failed", predictions=[], fault="gave no finite score"),
    )
    answers = pl.DataFrame({"person_id": [1, 7, 7], "prediction_id": ["answered", "again", None]})
    counts = count_logged(read_log(log, keyring), answers, key=key)
    assert counts == {"prediction_log_rows": 3, "orphans": 1, "others": 1, "without_score": 1}


def test_each_variant_shows_the_version_that_the_demo_served() -> None:
    """Other versions may have been the variant later. A file of an older release has no level for versions."""
    first, second = {"version": 1, "periods": {"2016": 1}}, {"version": 2, "periods": {"2016": 2}}
    output = {"details": {"champion": {"1": first, "2": second}, "other": {"9": first, "10": second}}}
    expected = {
        "variants": {"champion": {"2016": 1}, "other": {"2016": 2}},
        "details": {"champion": first, "other": second},
    }
    assert select_versions(output, {"champion": {"version": 1}}) == expected
    assert select_versions({"details": {"champion": first}}, {})["variants"] == {"champion": {"2016": 1}}
