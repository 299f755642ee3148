"""What the demo's summary says of the prediction log."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl

from cluster.records import SHADOW, SegmentWriter, read_predictions
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from jobs.pipeline.summary import logged
from tests.unit.cluster.test_records import prediction


def test_what_a_shadow_predicted_is_neither_a_logged_answer_nor_an_orphan(tmp_path: Path) -> None:
    """Nobody was to be answered with it; answers count once, however many entities they have."""
    keyring = Keyring.create(tmp_path / "keyring.json", bytes(32))
    keyring.ensure(KeyInfo(name="predictions/m/personal"))
    answered = dataclasses.replace(prediction(1), prediction_id="answered")
    log = tmp_path / "predictions" / "m"
    SegmentWriter(log, store=keyring, key="predictions/m/personal").append(
        answered,
        dataclasses.replace(answered, prediction_id="lost"),
        dataclasses.replace(answered, prediction_id="shadowed", arm=SHADOW),
    )
    answers = pl.DataFrame({"prediction_id": ["answered"]})
    assert logged(read_predictions(log, keyring), answers) == {"prediction_log_rows": 2, "orphans": 1}
