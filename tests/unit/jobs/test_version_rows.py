"""A version knows its training set, its label and its split, so commands about it need none of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from cluster.errors import TrainingSetError
from cluster.registry import Lineage, ModelVersion
from jobs.monitor.config import MonitorConfig
from jobs.monitor.reference import References, reference_rows
from jobs.train.config import LearningConfig, SplitConfig
from jobs.train.data import TrainingSet, prepare
from jobs.train.version_rows import held_out_rows, recorded_training_set, validation_rows
from tests.samples.model_versions import model_version

ROWS = 200


def source(seed: int = 0, *, digest: str = "h") -> TrainingSet:
    draw = np.random.default_rng(seed)
    table = pa.table(
        {
            "person_id": np.arange(ROWS),
            "age": draw.random(ROWS),
            "y": draw.integers(0, 2, ROWS),
            "event_timestamp": np.arange(ROWS),
        }
    )
    return TrainingSet(table=table, manifest={}, hash=digest)


def trained(**changes: object) -> ModelVersion:
    """Return a version with the lineage of a training job."""
    config = {
        "training_set": "t.parquet",
        "label": "y",
        "validation_share": 0.1,
        "split": {"column": "person_id", "modulo": 4, "remainder": 3},
    }
    return model_version(Lineage(training_set_hash="h", config=config | changes, seed=5))


def registered() -> ModelVersion:
    """Return a version with the lineage of a registered artifact."""
    config = {"training_set": "r.parquet", "label": "y", "rows": "all"}
    return model_version(Lineage(training_set_hash="h", config=config), version=2)


def test_the_validation_rows_are_those_of_training() -> None:
    """So a threshold is not chosen on rows that the trees were fitted to."""
    config = LearningConfig(
        name="m", training_set="t", label="y", seed=5, split=SplitConfig(column="person_id")
    )
    dataset = prepare(config, source())
    assert np.array_equal(validation_rows(trained(), source()), dataset.validation)
    assert np.array_equal(held_out_rows(trained(), source(), advice=""), dataset.held_out)
    assert not (dataset.fit & dataset.validation).any()


def test_rows_with_open_outcomes_belong_to_no_part() -> None:
    """They are judged by neither training nor evaluation, because their outcome may change."""
    window = {"outcome_window_days": 1.0, "outcomes_until": "1970-01-02T00:00:00.000100Z"}
    config = LearningConfig(
        name="m", training_set="t", label="y", seed=5, split=SplitConfig(column="person_id"), **window
    )
    dataset, version = prepare(config, timed_source()), trained(**window)
    assert np.array_equal(validation_rows(version, timed_source()), dataset.validation)
    held_out = held_out_rows(version, timed_source(), advice="")
    assert np.array_equal(held_out, dataset.held_out)
    assert held_out[:101].any()
    assert not held_out[101:].any()


def timed_source() -> TrainingSet:
    """Return rows one microsecond apart, from 1970 on."""
    plain = source()
    times = pa.array(range(ROWS), pa.timestamp("us", tz="UTC"))
    position = plain.table.column_names.index("event_timestamp")
    return replace(plain, table=plain.table.set_column(position, "event_timestamp", times))


def test_other_data_has_no_validation_rows() -> None:
    """Neither has a registered artifact, whose training is not known."""
    for version, data in ((trained(), source(digest="other")), (registered(), source())):
        with pytest.raises(TrainingSetError, match="no validation rows"):
            validation_rows(version, data)


def test_all_reference_rows_of_an_artifact_count() -> None:
    """It has no split."""
    assert held_out_rows(registered(), source(), advice="").all()


def test_a_version_without_a_known_training_set_is_refused() -> None:
    """The path of an imported version is one of another installation."""
    imported = model_version(Lineage(config={"training_set": "t.parquet"}))
    object.__setattr__(imported, "origin", {"installation": "staging"})
    with pytest.raises(TrainingSetError, match="imported from another installation"):
        recorded_training_set(imported)
    with pytest.raises(TrainingSetError, match="has no path"):
        recorded_training_set(model_version())


def test_each_version_is_compared_with_its_own_reference() -> None:
    """A file is read once. All versions share a configured file."""
    read: list[str] = []

    def reader(path: str) -> TrainingSet:
        read.append(path)
        return source()

    references = References(None, reader)
    assert [references.of(one).path for one in (trained(), registered(), trained())] == [
        "t.parquet",
        "r.parquet",
        "t.parquet",
    ]
    assert read == ["t.parquet", "r.parquet"]
    assert References("mine.parquet", reader).of(trained()).path == "mine.parquet"


def test_a_changed_training_set_is_no_reference() -> None:
    """Otherwise drift against other rows would look like drift against the training rows."""
    with pytest.raises(TrainingSetError, match="not the training set of version 1 of 'm' any more"):
        References(None, lambda _: source(digest="new")).of(trained())


def test_a_monitor_without_options_uses_the_held_out_rows() -> None:
    """Those of the version's own split; all rows of a registered artifact."""
    config = MonitorConfig(name="m")
    rows = reference_rows(source(), trained(), config)
    assert rows["person_id"].to_list() == list(range(3, ROWS, 4))
    assert reference_rows(source(), registered(), config).height == ROWS
    assert isinstance(rows, pl.DataFrame)
