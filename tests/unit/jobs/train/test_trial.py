"""The fits of a sweep's trials: what each family reports."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.placement import ScalingConfig
from jobs.train import lightgbm
from jobs.train.config import DeepSpeedConfig, LearningConfig
from jobs.train.data import TrainingSet
from jobs.train.families import FitContext, resolve_family
from jobs.train.training_data import TrainingData, prepare_rows
from jobs.train.trial import fit_trial, num_reports, trial_cpus
from jobs.train.trial_error import TrialFailed, without_values
from tests.samples import plain_fit
from tests.unit.jobs.train.conftest import people


def prepared() -> TrainingData:
    config = LearningConfig(name="m", training_set="t", label="y")
    return prepare_rows(config, TrainingSet(table=people(500), manifest={}, hash="h"))


def reports(folder: Path, model: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a trial reports."""
    context = FitContext(
        folder=folder,
        runs="",
        seed=0,
        scaling=ScalingConfig(),
        deepspeed=DeepSpeedConfig(),
        run_name="",
    )
    found: list[dict[str, Any]] = []
    fit_trial(prepared(), resolve_family(model), context, num_workers=0, report=found.append)
    return found


@pytest.mark.parametrize(("patience", "count"), [(30, 3), (2, 1)])
def test_trees_report_the_best_loss_after_each_segment(tmp_path: Path, patience: int, count: int) -> None:
    """Also after the last one, which may be shorter, or ended by early stopping. The last loss is that of the fit."""
    model = {"family": "lightgbm", "rounds": 25, "segment_rounds": 10, "patience": patience}
    model |= {"learning_rate": 0.5, "num_threads": 1}
    losses = [report["validation_loss"] for report in reports(tmp_path, model)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == count
    data, parameters = prepared(), resolve_family(model).parameters
    fitted = lightgbm.fit_trees(data.rows, parameters, 0, files=None, on_round=lambda *_: None)
    assert fitted.loss == f"validation binary_logloss {losses[-1]:.4f}"


def test_a_family_with_fit_reports_once(tmp_path: Path) -> None:
    """The loss on the validation rows. More rounds give a smaller one."""
    model = {"family": "mine", "module": plain_fit.__name__}
    [few] = reports(tmp_path, model | {"rounds": 1})
    [many] = reports(tmp_path, model | {"rounds": 20})
    assert 0 < many["validation_loss"] < few["validation_loss"]


def test_the_error_of_a_trial_has_no_values_of_rows() -> None:
    """Tune and Ray write it into files that are not encrypted. Only Falaj's own messages have none."""

    def fail() -> None:
        raise ValueError("bob is 42") from KeyError("bob")

    def caught(function: Callable[[], None]) -> Exception:
        with pytest.raises(ValueError, match="bob") as error:
            function()
        return without_values(error.value)

    failed = pickle.loads(pickle.dumps(caught(fail)))  # noqa: S301 - our own object
    assert isinstance(failed, TrialFailed)
    assert failed.reason == "ValueError"
    assert str(failed).startswith("ValueError in fail, test_trial.py line ")
    assert without_values(failed) is failed
    refused = ConfigError("There are fewer rows than workers.")
    wrapped = ValueError("bob")
    wrapped.__cause__ = refused
    assert without_values(wrapped) is refused


def test_a_trial_counts_its_reports(tmp_path: Path) -> None:
    """So that ASHA and the ledger know them, also if a fit begins again."""
    model = {"family": "lightgbm", "rounds": 25, "segment_rounds": 10, "num_threads": 1}
    assert [report["rung"] for report in reports(tmp_path, model)] == [1, 2, 3]
    assert [
        report["rung"] for report in reports(tmp_path, {"family": "mine", "module": plain_fit.__name__})
    ] == [1]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"family": "tabular_network", "epochs": 7}, 7),
        ({"family": "lightgbm", "rounds": 101, "segment_rounds": 50}, 3),
        ({"family": "mine", "module": plain_fit.__name__}, 1),
    ],
)
def test_the_number_of_reports_is_known_before(model: dict[str, Any], expected: int) -> None:
    """ASHA's rungs need it."""
    assert num_reports(resolve_family(model)) == expected


def test_a_trial_reserves_the_cpus_that_it_uses() -> None:
    """With workers, its own process only waits."""
    network, trees = resolve_family({"family": "tabular_network"}), resolve_family({"family": "lightgbm"})
    assert trial_cpus(network, num_workers=0, cpus_per_worker=2.0) == 2.0
    assert trial_cpus(network, num_workers=2, cpus_per_worker=2.0) == 0.5
    assert trial_cpus(trees, num_workers=0, cpus_per_worker=1.0) == 2.0
