"""What training refuses or warns of before and while it fits."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import RayTaskError

from cluster.errors import ConfigError, TrainingFailed, TrainingSetError
from cluster.runtime import Task
from jobs.metrics import headline, regression_metrics
from jobs.sweep.trials import outcome, winner
from jobs.train.checks import check_rows
from jobs.train.config import LearningConfig, SplitConfig
from jobs.train.data import Dataset, TrainingSet, prepare
from jobs.train.lightgbm import _follow
from jobs.train.progress import Report, _display, describe
from jobs.train.tabular_network.family import Parameters, describe_steps, network_shape, rows_per_step
from jobs.train.tabular_network.loop import steps_per_epoch

ROWS = 400
DRAW = np.random.default_rng(0)
LABEL = DRAW.integers(0, 2, ROWS)
NOISE = DRAW.normal(size=ROWS)
VALUE = DRAW.normal(size=ROWS) * 1000
THREE = DRAW.integers(0, 3, ROWS)


def dataset(label: Any = LABEL, *, task: Task = Task.binary, **inputs: Any) -> Dataset:
    table = pa.table({"row_id": range(ROWS), "noise": NOISE, **inputs, "y": label})
    config = LearningConfig(
        name="m", training_set="t", label="y", task=task, split=SplitConfig(column="row_id")
    )
    return prepare(config, TrainingSet(table=table, manifest={}, hash="h"))


def where_held_out(value: int) -> list[int]:
    return [value if n % 4 == 3 else int(LABEL[n]) for n in range(ROWS)]


@pytest.mark.parametrize(
    ("label", "task", "said"),
    [
        ([0 if n % 4 != 3 else n // 4 % 2 for n in range(ROWS)], Task.binary, "same value of label 'y'"),
        (where_held_out(1), Task.binary, "auc is undefined"),
        (where_held_out(1), Task.multiclass, "auc is undefined"),
        ([1.5] * ROWS, Task.regression, "nothing to learn"),
    ],
)
def test_a_label_that_cannot_be_learned_or_judged_is_refused(label: Any, task: Task, said: str) -> None:
    """One class to fit on teaches nothing, one class held out leaves the metric undefined."""
    with pytest.raises(TrainingSetError, match=said):
        check_rows(dataset(label, task=task))


def test_a_class_without_rows_is_named() -> None:
    """Among those to fit on, or those held out."""
    rare = ["rare" if n == 3 else f"c{THREE[n]}" for n in range(ROWS)]
    assert check_rows(dataset(rare, task=Task.multiclass)) == ["no training row has label 'y' = 'rare'"]


@pytest.mark.parametrize(
    ("inputs", "label", "task"),
    [
        ({"leak": LABEL}, LABEL, Task.binary),
        ({"leak": [f"code{1 - n}" for n in LABEL]}, LABEL, Task.binary),
        ({"leak": LABEL * 10 + DRAW.uniform(0, 9, ROWS)}, LABEL, Task.binary),
        ({"leak": -LABEL * 10 + DRAW.uniform(0, 9, ROWS)}, LABEL, Task.binary),
        ({"leak": [1.0 if n else None for n in LABEL]}, LABEL, Task.binary),
        ({"leak": [(n * 7 + 3) % 11 for n in THREE]}, THREE, Task.multiclass),
        ({"leak": -THREE + DRAW.uniform(0, 0.9, ROWS)}, THREE, Task.multiclass),
        ({"leak": VALUE}, VALUE, Task.regression),
        ({"leak": np.exp(-VALUE / 1000)}, VALUE, Task.regression),
    ],
)
def test_an_input_that_gives_the_label_away_is_named(inputs: Any, label: Any, task: Task) -> None:
    """A copy, other codes, the same ranking in either direction, or missing just where the label says."""
    found = check_rows(dataset(label, task=task, **inputs))
    assert len(found) == 1
    assert found[0].startswith("leak: input 'leak'")


@pytest.mark.parametrize(
    ("label", "task"), [(LABEL, Task.binary), (THREE, Task.multiclass), (VALUE, Task.regression)]
)
def test_inputs_that_are_merely_good_are_not_called_leaks(label: Any, task: Task) -> None:
    """Strong but with errors, and categories of one row each, which fit by chance."""
    good = np.where(DRAW.random(ROWS) < 0.1, 0, label) + DRAW.normal(0, 0.05, ROWS)
    unique = [f"id{n}" for n in range(ROWS)]
    assert check_rows(dataset(label, task=task, good=good, unique=unique)) == []


def test_doubled_and_constant_inputs_are_named() -> None:
    """Each with the columns' names."""
    found = check_rows(dataset(same=NOISE, fixed=[3] * ROWS, empty=pa.nulls(ROWS, pa.float64())))
    assert found == [
        "inputs 'noise', 'same' hold the same values; one of them is enough",
        "input 'empty' has no value in any row to fit on",
        "input 'fixed' has the same value in all rows to fit on",
    ]


def test_an_input_that_is_named_twice_is_refused() -> None:
    """It would count twice, and a request gives it once."""
    source = TrainingSet(table=pa.table({"a": NOISE, "y": LABEL}), manifest={}, hash="h")
    config = LearningConfig(name="m", training_set="t", label="y", inputs=["a", "a"])
    with pytest.raises(TrainingSetError, match="'a' is named twice"):
        prepare(config, source)
    twice = pa.table([NOISE, NOISE, LABEL], names=["a", "a", "y"])
    with pytest.raises(TrainingSetError, match="two columns 'a'"):
        prepare(
            LearningConfig(name="m", training_set="t", label="y"),
            TrainingSet(table=twice, manifest={}, hash="h"),
        )


@pytest.mark.parametrize(
    ("rows", "batch", "steps"), [(50_000, 1024, 48), (20_000, 1024, 19), (2025, 64, 31), (100, 16, 6)]
)
def test_small_data_gets_small_batches(rows: int, batch: int, steps: int) -> None:
    """At least 16 steps an epoch where there are rows for it; large data has the batch it had."""
    data = SimpleNamespace(fit=np.ones(rows, np.bool_))
    assert rows_per_step(data, Parameters()) == batch  # type: ignore[arg-type]
    assert steps_per_epoch(rows, batch_size=batch, workers=1) == steps


def test_a_batch_that_leaves_one_step_is_warned_of() -> None:
    """With how many rows and steps there are."""
    said = describe_steps(dataset(), Parameters(batch_size=1024), num_workers=2)
    assert "8 epochs of 1 steps of 1024 rows (270 rows to fit on)" in said
    assert "warning: model.batch_size=1024 leaves 1 steps an epoch" in said
    assert "warning" not in describe_steps(dataset(), Parameters(), num_workers=2)
    with pytest.raises(ConfigError, match="300 workers cannot share 270 rows"):
        describe_steps(dataset(), Parameters(), num_workers=300)


def test_huge_inputs_are_standardised_by_their_mean() -> None:
    """Their sum overflows in float32, and the mean of all would be infinite."""
    shape = network_shape(dataset(huge=np.full(ROWS, 3e38)), Parameters())
    assert shape.means[1] == pytest.approx(3e38)
    assert all(map(math.isfinite, shape.scales))


def test_a_loss_that_is_no_number_ends_the_fit_in_its_first_round() -> None:
    """By name, and not after 600 rounds."""
    env = SimpleNamespace(iteration=0, evaluation_result_list=[("validation", "l2", math.nan, False)])
    with pytest.raises(TrainingFailed, match=r"validation l2 loss is nan in round 1.*learning_rate"):
        _follow(None, every=1)(env)  # type: ignore[arg-type]


def test_a_log_gets_about_twenty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run of many rounds: the first, the last, and some between."""
    with _display("round", 200) as show:
        for done in range(1, 201):
            show(Report(done=done, figures={"loss": 1 / done}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[-1].strip() == describe(Report(done=200, figures={"loss": 1 / 200}), unit="round", total=200)


def trial(loss: float | None, error: Exception | None = None) -> Any:
    metrics = {} if loss is None else {"validation_loss": loss}
    return SimpleNamespace(config={"learning_rate": 0.01, "width": 64}, metrics=metrics, error=error)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_wins_a_sweep(bad: float) -> None:
    """In whichever order the trials came."""
    losses = [bad, 0.7, bad, 0.6, bad]
    trials = [outcome(trial(loss), deadline_s=1) for loss in losses]
    assert winner(trials).validation_loss == 0.6
    assert trials[0].cause == f"validation_loss is {bad}"


def test_a_sweep_without_a_winner_says_why_for_each_trial(capsys: pytest.CaptureFixture[str]) -> None:
    """One line a trial, without a traceback."""
    refusal = TrainingFailed("The training loss is nan in epoch 1 of 1: the fit diverged.")
    in_worker = RayTaskError("f", "Traceback …\nmore", refusal).as_instanceof_cause()
    results = [trial(math.nan), trial(None), trial(0.5, in_worker), trial(None, RuntimeError("a\nlast line"))]
    with pytest.raises(TrainingFailed, match="None of 4 trials"):
        winner([outcome(one, deadline_s=9) for one in results])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("width=64: ")[2] for line in lines] == [
        "validation_loss is nan",
        "ended before its first epoch did (sweep.trial_deadline_s is 9)",
        "The training loss is nan in epoch 1 of 1: the fit diverged.",
        "last line",
    ]


def test_an_undefined_metric_is_said_in_words() -> None:
    """And is null in JSON."""
    assert headline(Task.binary, {"auc": 0.81234}) == "auc 0.8123"
    assert headline(Task.binary, {"auc": None}) == "auc undefined (one class in these rows)"
    assert headline(Task.regression, {"rmse": 2.5e38}) == "rmse 2.5e+38"
    assert json.loads(json.dumps(regression_metrics(np.ones(2), np.ones(2))))["r2"] is None
