"""Refusals and warnings of training, before and during the fit."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import ConfigError, TrainingFailed, TrainingSetError
from cluster.runtime import Task
from jobs.metrics import headline, regression_metrics
from jobs.train.checks import check_rows
from jobs.train.config import LearningConfig, SplitConfig
from jobs.train.data import TrainingSet, prepare
from jobs.train.network.plan import Steps, describe_steps, plan_steps
from jobs.train.network.protocol import network_signature
from jobs.train.progress import Report, _display, describe
from jobs.train.tabular_network.family import Parameters
from jobs.train.training_data import TrainingData, prepare_rows
from jobs.train.trees.segments import Segment, _update

ROWS = 400
DRAW = np.random.default_rng(0)
LABEL = DRAW.integers(0, 2, ROWS)
NOISE = DRAW.normal(size=ROWS)
VALUE = DRAW.normal(size=ROWS) * 1000
THREE = DRAW.integers(0, 3, ROWS)


def dataset(label: Any = LABEL, *, task: Task = Task.binary, **inputs: Any) -> TrainingData:
    table = pa.table({"row_id": range(ROWS), "noise": NOISE, **inputs, "y": label})
    config = LearningConfig(
        name="m", training_set="t", label="y", task=task, split=SplitConfig(column="row_id")
    )
    return prepare_rows(config, TrainingSet(table=table, manifest={}, hash="h"))


def with_held_out_label(value: int) -> list[int]:
    """Return the labels with `value` in all held-out rows."""
    return [value if n % 4 == 3 else int(LABEL[n]) for n in range(ROWS)]


@pytest.mark.parametrize(
    ("label", "task", "message"),
    [
        ([0 if n % 4 != 3 else n // 4 % 2 for n in range(ROWS)], Task.binary, "same value of label 'y'"),
        (with_held_out_label(1), Task.binary, "auc is undefined"),
        (with_held_out_label(1), Task.multiclass, "auc is undefined"),
        ([1.5] * ROWS, Task.regression, "nothing to learn"),
    ],
)
def test_a_label_with_one_class_is_refused(label: Any, task: Task, message: str) -> None:
    """One class in the rows to fit on teaches nothing. One class in the held-out rows leaves the metric undefined."""
    with pytest.raises(TrainingSetError, match=message):
        check_rows(dataset(label, task=task))


def test_a_class_without_rows_gives_a_warning() -> None:
    """The warning names the class and the part of the split."""
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
def test_a_leaking_input_gives_a_warning(inputs: Any, label: Any, task: Task) -> None:
    """A copy, other codes, the same ranking in either direction, or missing values that depend on the label."""
    warnings = check_rows(dataset(label, task=task, **inputs))
    assert len(warnings) == 1
    assert warnings[0].startswith("leak: input 'leak'")


@pytest.mark.parametrize(
    ("label", "task"), [(LABEL, Task.binary), (THREE, Task.multiclass), (VALUE, Task.regression)]
)
def test_good_inputs_are_not_leaks(label: Any, task: Task) -> None:
    """A strong input with errors, and a categorical input with one row per value, which fits by chance."""
    good = np.where(DRAW.random(ROWS) < 0.1, 0, label) + DRAW.normal(0, 0.05, ROWS)
    unique = [f"id{n}" for n in range(ROWS)]
    assert check_rows(dataset(label, task=task, good=good, unique=unique)) == []


def test_duplicate_and_constant_inputs_give_warnings() -> None:
    """The warnings name the columns."""
    warnings = check_rows(dataset(same=NOISE, fixed=[3] * ROWS, empty=pa.nulls(ROWS, pa.float64())))
    assert warnings == [
        "inputs 'noise', 'same' have the same values; one of them is enough",
        "input 'empty' has no value in any row to fit on",
        "input 'fixed' has the same value in all rows to fit on",
    ]


def test_a_duplicate_input_or_column_is_refused() -> None:
    """The input would count twice in training, but a request has it only once."""
    source = TrainingSet(table=pa.table({"a": NOISE, "y": LABEL}), manifest={}, hash="h")
    config = LearningConfig(name="m", training_set="t", label="y", inputs=["a", "a"])
    with pytest.raises(TrainingSetError, match="'a' is named twice"):
        prepare(config, source)
    for name in ("a", ""):
        twice = pa.table([NOISE, NOISE, LABEL], names=[name, name, "y"])
        with pytest.raises(TrainingSetError, match=f"two columns '{name}'"):
            prepare(
                LearningConfig(name="m", training_set="t", label="y"),
                TrainingSet(table=twice, manifest={}, hash="h"),
            )


@pytest.mark.parametrize(
    ("rows", "batch", "num_steps"), [(50_000, 1024, 48), (20_000, 1024, 19), (2025, 64, 31), (100, 16, 6)]
)
def test_small_data_gets_small_batches(rows: int, batch: int, num_steps: int) -> None:
    """At least 16 steps per epoch if there are enough rows; at most 1,024 rows per step."""
    steps = plan_steps(rows, Parameters(epochs=3), workers=[1], accumulation=1)
    assert steps == Steps(epochs=3, steps=steps.steps, batch_rows=batch)
    assert steps.steps == num_steps


def test_a_batch_is_divided_among_workers_and_passes() -> None:
    """It has the same rows for every number of workers. Workers that do not divide it, or without rows, are refused."""
    assert plan_steps(1000, Parameters(), workers=[3], accumulation=2).batch_rows == 30
    assert plan_steps(270, Parameters(batch_size=1024), workers=[1, 2], accumulation=1).batch_rows == 270
    with pytest.raises(
        ConfigError, match=r"batch_size=100 cannot be divided among 3 workers .*batch_size=99"
    ):
        plan_steps(1000, Parameters(batch_size=100), workers=[3], accumulation=1)
    with pytest.raises(ConfigError, match="300 workers are too many for 270 rows"):
        plan_steps(270, Parameters(), workers=[300], accumulation=1)


def test_a_batch_size_with_one_step_gives_a_warning() -> None:
    """The description has the numbers of rows and steps."""

    def description(parameters: Parameters) -> str:
        steps = plan_steps(270, parameters, workers=[2], accumulation=1)
        return describe_steps(steps, 270, parameters, workers=[2])

    assert "8 epochs of 1 steps of 270 rows (270 rows to fit on)" in description(Parameters(batch_size=1024))
    assert "warning: model.batch_size=1024 gives only 1 steps" in description(Parameters(batch_size=1024))
    assert "warning" not in description(Parameters())


def test_huge_inputs_have_a_finite_mean_and_scale() -> None:
    """Their sum overflows in float32."""
    signature = network_signature(dataset(huge=np.full(ROWS, 3e38)))
    assert signature.means[1] == pytest.approx(3e38)
    assert all(map(math.isfinite, signature.scales))


def test_a_nan_loss_ends_the_fit_in_the_first_round() -> None:
    """The message names the loss and the round."""
    env = SimpleNamespace(iteration=0, evaluation_result_list=[("validation", "l2", math.nan, False)])
    with pytest.raises(TrainingFailed, match=r"validation l2 loss is nan in round 1.*learning_rate"):
        _update(Segment(), env, lambda completed, losses: None)  # type: ignore[arg-type]


def test_a_long_fit_logs_about_twenty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Including the first and the last round."""
    with _display("round", 200) as show:
        for completed in range(1, 201):
            show(Report(completed=completed, losses={"loss": 1 / completed}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[-1].strip() == describe(
        Report(completed=200, losses={"loss": 1 / 200}), unit="round", total=200
    )


def test_an_undefined_metric_is_printed_as_undefined() -> None:
    """In JSON it is null."""
    assert headline(Task.binary, {"auc": 0.81234}) == "auc 0.8123"
    assert headline(Task.binary, {"auc": None}) == "auc undefined (one class in these rows)"
    assert headline(Task.regression, {"rmse": 2.5e38}) == "rmse 2.5e+38"
    assert json.loads(json.dumps(regression_metrics(np.ones(2), np.ones(2))))["r2"] is None
