"""Confidence intervals: the same metrics as without weights, entities as the unit, bounded memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.registry import Lineage
from cluster.runtime import InputSpec, ModelSignature, Predictions, Task
from jobs.evaluate import bootstrap
from jobs.evaluate.bootstrap import intervals, metric_statistic
from jobs.evaluate.rows import entity_columns, entity_numbers
from jobs.metrics import score
from jobs.train.data import TrainingSet
from tests.samples.model_versions import model_version

ROWS = 300


def sample(task: Task, *, rows: int = ROWS, seed: int = 0) -> tuple[Predictions, Any]:
    """Return predictions and the target of rows. Some rows have equal scores."""
    draw = np.random.default_rng(seed)
    classes = {Task.binary: (0, 1), Task.multiclass: ("a", "b", "c"), Task.regression: None}[task]
    signature = ModelSignature(
        task=task, inputs=(InputSpec(name="x", dtype="double"),), label="y", classes=classes
    )
    if task is Task.regression:
        values = draw.normal(size=rows)
        return Predictions(signature=signature, scores=values), values + draw.normal(size=rows)
    if task is Task.binary:
        scores = np.round(draw.random(rows), 2)
        return Predictions(signature=signature, scores=scores), (draw.random(rows) < scores).astype(np.int64)
    raw = draw.random((rows, 3))
    return Predictions(signature=signature, scores=raw / raw.sum(axis=1, keepdims=True)), draw.integers(
        0, 3, rows
    )


@pytest.mark.parametrize("task", list(Task))
def test_weights_of_one_give_the_usual_metrics(task: Task) -> None:
    """So the intervals are those of the metrics that training and evaluation report."""
    predictions, target = sample(task)
    weighted = metric_statistic(predictions, target)(np.ones((1, ROWS)))
    usual = score(predictions, target)
    for name, values in weighted.items():
        assert values[0] == pytest.approx(usual[name], abs=1e-12), name


@pytest.mark.parametrize("task", list(Task))
def test_a_weight_counts_like_a_repeated_row(task: Task) -> None:
    """A row with weight 2 is the same as two rows, and a row with weight 0 is no row."""
    predictions, target = sample(task)
    weights = np.random.default_rng(1).integers(0, 3, ROWS)
    repeated = np.repeat(np.arange(ROWS), weights)
    expected = score(
        Predictions(signature=predictions.signature, scores=predictions.scores[repeated]), target[repeated]
    )
    for name, values in metric_statistic(predictions, target)(weights[None].astype(float)).items():
        assert values[0] == pytest.approx(expected[name], abs=1e-9), name


def test_rows_of_one_entity_are_drawn_together() -> None:
    """If each row is copied ten times, the interval is as wide as before. With rows as unit, it would be narrower."""
    predictions, target = sample(Task.binary)
    tenfold = Predictions(signature=predictions.signature, scores=np.repeat(predictions.scores, 10))
    statistic = metric_statistic(tenfold, np.repeat(target, 10))
    settings: dict[str, Any] = {"replicates": 400, "level": 0.95, "seed": 0}
    once = intervals([metric_statistic(predictions, target)], np.arange(ROWS), **settings)["auc"]
    entities = intervals([statistic], np.repeat(np.arange(ROWS), 10), **settings)["auc"]
    rows = intervals([statistic], np.arange(10 * ROWS), **settings)["auc"]
    assert once is not None
    assert rows is not None
    assert entities == pytest.approx(once)
    assert rows[1] - rows[0] < 0.5 * (once[1] - once[0])


def test_an_interval_covers_the_true_accuracy() -> None:
    """Of 200 samples with five dependent rows per entity, 90 % to 99 % of the 95 % intervals have the true value."""
    draw, covered = np.random.default_rng(0), 0
    for number in range(200):
        right = draw.random(80) < 0.7  # an entity's five rows are all right or all wrong
        predictions, _ = sample(Task.binary, rows=400)
        target = np.where(np.repeat(right, 5), predictions.scores >= 0.5, predictions.scores < 0.5).astype(
            np.int64
        )
        found = intervals(
            [metric_statistic(predictions, target)],
            np.repeat(np.arange(80), 5),
            replicates=200,
            level=0.95,
            seed=number,
        )["accuracy"]
        covered += found is not None and found[0] <= 0.7 <= found[1]
    assert 180 <= covered <= 198


def test_a_metric_without_a_value_has_no_interval() -> None:
    """An example is the AUC of rows with one class."""
    predictions, target = sample(Task.binary)
    found = intervals(
        [metric_statistic(predictions, np.zeros_like(target))],
        np.arange(ROWS),
        replicates=100,
        level=0.9,
        seed=0,
    )
    assert found["auc"] is None
    assert found["accuracy"] is not None


def test_memory_does_not_grow_with_the_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicates are computed in blocks of limited size."""
    monkeypatch.setattr(bootstrap, "BLOCK", 20_000)
    predictions, target = sample(Task.binary, rows=2000)
    peaks = []
    for replicates in (100, 1000):
        tracemalloc.start()
        intervals(
            [metric_statistic(predictions, target)], np.arange(2000), replicates=replicates, level=0.9, seed=0
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_entities_come_from_the_join_keys() -> None:
    """The split's column is the entity if it is a join key. Without keys, each row is an entity."""
    table = pa.table(
        {"person": [1, 1, 2, None, None], "shop": ["a", "b", "a", "a", "a"], "year": [1, 2, 1, 2, 1]}
    )
    source = TrainingSet(table=table, manifest={}, hash="h", join_keys=("person", "shop"))
    by_split = model_version(Lineage(config={"split": {"column": "person"}}))
    by_year = model_version(Lineage(config={"split": {"column": "year"}}))
    assert entity_columns(by_split, source, None) == ["person"]
    assert entity_columns(by_year, source, None) == ["person", "shop"]
    assert entity_columns(by_year, source, []) == []
    assert entity_numbers(table, ["person"]).tolist() == [0, 0, 1, 2, 2]
    assert len(set(entity_numbers(table, ["person", "shop"]).tolist())) == 4
    assert entity_numbers(table, []).tolist() == [0, 1, 2, 3, 4]
