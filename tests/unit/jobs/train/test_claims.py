"""Two jobs with the same run at the same time: the second one reads again what the first one recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import ModelRegistered
from cluster.registry import Lineage
from jobs.sweep import __main__ as sweep_command
from jobs.sweep.config import SweepConfig
from jobs.sweep.history import Status
from jobs.sweep.record import SweepRecord
from jobs.train import __main__ as train_command
from jobs.train import progress
from jobs.train.config import TrainConfig
from jobs.train.families import resolve_family
from jobs.train.run.identity import RunClaimed

OPTIONS: dict[str, Any] = {"name": "m", "training_set": "t", "label": "y", "run": "a"}
FAMILY = resolve_family({"family": "lightgbm"})
NOTHING: Any = None


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    yield ledger
    ledger.close()


def sweep_record(ledger: Ledger) -> SweepRecord:
    return SweepRecord(ledger=ledger, model="m", run="a", family="lightgbm", settings={}, actor="me")


def finish_sweep(record: SweepRecord) -> Any:
    trial = record.trial_started(1, {"a": 1})
    record.trial_reported(trial, 1, 0.5)
    record.trial_ended(trial, Status.finished)
    return record.finish(training_set_hash="h")


def test_a_sweep_that_another_job_has_finished_runs_no_trial(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other job ends while this one waits for its claim."""
    record = sweep_record(ledger)
    record.start()

    @contextlib.contextmanager
    def claimed_run(run: str) -> Iterator[None]:
        finish_sweep(sweep_record(ledger))
        yield

    monkeypatch.setattr(sweep_command, "claimed_run", claimed_run)
    for name in ("prepare_and_describe", "attach"):
        monkeypatch.setattr(sweep_command, name, lambda *args, **options: SimpleNamespace(data=None))
    data = SimpleNamespace(fit=np.ones(3))
    monkeypatch.setattr(sweep_command, "limit_fit_rows", lambda *args, **options: data)
    event = sweep_command.search(SweepConfig(**OPTIONS), FAMILY, {}, NOTHING, record)
    assert event.best_trial == 1
    assert record.trials[1].loss == 0.5


def test_the_first_result_of_a_sweep_stays(ledger: Ledger) -> None:
    """A second job gets the recorded result, and not its own."""
    first = finish_sweep(sweep_record(ledger))
    late = sweep_record(ledger)
    trial = late.trial_started(2, {"a": 2})
    late.trial_reported(trial, 1, 0.1)
    late.trial_ended(trial, Status.finished)
    assert late.finish(training_set_hash="h") == first


def test_a_claimed_run_is_refused_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a second process with the same name. The refusal says nothing about the run itself."""

    def taken(**options: Any) -> None:
        raise ValueError("The name is already taken.")

    monkeypatch.setattr(progress, "Queue", taken)
    monkeypatch.setattr(progress, "_CLAIM_S", 0.0)
    with pytest.raises(RunClaimed, match=r"Run 'a' is running in another job\. Wait"):
        progress.claim_run("a")


def test_a_run_that_another_job_has_finished_registers_no_second_version(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other job registers its version while this one waits for its claim."""

    @contextlib.contextmanager
    def claimed_run(run: str) -> Iterator[None]:
        lineage = asdict(Lineage(config={"run": "a"}))
        registered = ModelRegistered(
            name="m",
            version=3,
            family="lightgbm",
            task="binary",
            manifest_hash="",
            files={},
            lineage=lineage,
            metrics={"auc": 0.5},
        )
        ledger.append(registered, actor="me")
        yield

    @contextlib.contextmanager
    def folder(*args: Any, **options: Any) -> Iterator[None]:
        yield

    removed: list[str] = []
    monkeypatch.setattr(progress, "claimed_run", claimed_run)
    monkeypatch.setattr(train_command, "attach", lambda config: None)
    monkeypatch.setattr(train_command, "key_store", lambda access: SimpleNamespace(ensure=lambda key: None))
    files = SimpleNamespace(remove_state=lambda: removed.append("state"))
    monkeypatch.setattr(train_command, "files_of_run", lambda config, actor: files)
    monkeypatch.setattr(train_command, "run_folder", folder)
    config = TrainConfig(**OPTIONS)
    config.storage.root = str(tmp_path)
    actor: Any = SimpleNamespace(access=None)
    version = train_command.train(config, FAMILY, NOTHING, NOTHING, ledger, actor, sweep={})
    assert version.version == 3
    assert removed == ["state"]
