"""The identity of runs in the ledger, and the comparison of two runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError, TrainingFailed
from cluster.ledger import Ledger
from cluster.ledger.events import ModelRegistered, RunFailed, RunFinished, RunStarted
from cluster.registry import Lineage
from cluster.security.keys.access import KeyAccess
from jobs.train.config import CheckpointConfig, TrainAction, TrainConfig
from jobs.train.lightgbm import Parameters
from jobs.train.network.loop import LoopState, Rank
from jobs.train.network.saver import DECIDE_STEPS, Saver
from jobs.train.run.compare import comparison_plot, comparison_table, read_run
from jobs.train.run.files import (
    CheckpointName,
    RunFiles,
    best_path,
    newest_complete,
    remove_old,
    run_files,
    write_manifest,
)
from jobs.train.run.identity import (
    Finished,
    RunClaimed,
    check_settings,
    find_finished,
    new_run_id,
    record_failed,
    record_finished,
    record_started,
    run_settings,
)
from jobs.train.run.record import Run

OWNER: dict[str, str] = {"model": "m", "run": "a"}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    yield ledger
    ledger.close()


def settings(data: str = "h", **changes: Any) -> dict[str, Any]:
    config = TrainConfig(**{"name": "m", "training_set": "t", "label": "y"} | changes)
    return run_settings(config, "lightgbm", Parameters(), data)


def start(ledger: Ledger, run: str = "a", **changes: Any) -> None:
    record_started(ledger, model="m", run=run, family="lightgbm", settings=settings(**changes), actor="me")


def register(ledger: Ledger) -> None:
    """Record a version of the run `a`."""
    registered = ModelRegistered(
        name="m",
        version=3,
        family="lightgbm",
        task="binary",
        manifest_hash="",
        files={},
        lineage=asdict(Lineage(config={"run": "a"})),
        metrics={"auc": 0.5},
    )
    ledger.append(registered, actor="me")


def test_a_large_number_is_the_same_after_the_ledger_has_stored_it(ledger: Ledger) -> None:
    """The ledger stores a large whole number as text, because JSON has no such number."""
    large = settings() | {"model.weight_decay": 1e30}
    record_started(ledger, **OWNER, family="lightgbm", settings=large, actor="user:test")
    assert check_settings(ledger, **OWNER, settings=large)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"started with seed=0, not 1"),
        ({"data": "other"}, r"data\.hash=h, not other"),
        ({"exclude": ["age"]}, r"exclude=\[\], not \['age'\]"),
    ],
)
def test_a_run_with_other_settings_or_data_is_refused(
    ledger: Ledger, changes: dict[str, Any], message: str
) -> None:
    """The message names the setting. Settings that do not change the model may differ."""
    assert not check_settings(ledger, **OWNER, settings=settings())
    start(ledger)
    assert check_settings(ledger, **OWNER, settings=settings(output="elsewhere.json"))
    with pytest.raises(ConfigError, match=message):
        check_settings(ledger, **OWNER, settings=settings(**changes))


def test_a_run_is_finished_once(ledger: Ledger) -> None:
    """A failed run is not finished. A run that was killed after the registration is."""
    start(ledger)
    record_failed(ledger, **OWNER, reason="TrainingFailed", actor="me")
    assert find_finished(ledger, **OWNER) is None
    register(ledger)
    result = find_finished(ledger, **OWNER)
    assert result == Finished(3, {"auc": 0.5})
    for _ in range(2):
        record_finished(ledger, **OWNER, result=result, actor="me")
    assert find_finished(ledger, model="m", run="b") is None
    assert ledger.head() == 4


def test_the_record_of_a_run_says_how_it_ended(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure is recorded and raised. A second job continues the run, and it is started and finished once."""
    run = Run(ledger=ledger, **OWNER, family="lightgbm", settings=settings(), actor="me")
    assert not run.check_settings()
    with pytest.raises(TrainingFailed), run.recorded(is_continued=False):
        raise TrainingFailed("The loss is NaN.")
    assert run.check_settings()
    assert run.finished_version() is None
    with run.recorded(is_continued=True):
        register(ledger)
    assert run.finished_version() == 3
    assert [entry.payload["reason"] for entry in ledger.entries(RunFailed)] == ["TrainingFailed"]
    assert len(list(ledger.entries(RunStarted))) == len(list(ledger.entries(RunFinished))) == 1
    assert capsys.readouterr().out == "run a starts\nrun a continues\n"


def test_a_job_without_the_claim_records_nothing_about_the_run(ledger: Ledger) -> None:
    """The run goes on in another job, so it has not failed."""
    start(ledger)
    run = Run(ledger=ledger, **OWNER, family="lightgbm", settings=settings(), actor="me")
    before = ledger.head()
    with pytest.raises(ConfigError, match="is running"), run.recorded(is_continued=True):
        raise RunClaimed("Run 'a' is running in another job.")
    assert ledger.head() == before


def test_a_run_needs_its_options() -> None:
    """A comparison needs two runs and nothing else. A new id differs from the last one."""
    assert TrainConfig(action=TrainAction.compare, runs=["a", "b"]).runs == ["a", "b"]
    with pytest.raises(ValueError, match="two runs"):
        TrainConfig(action=TrainAction.compare, runs=["a"])
    with pytest.raises(ValueError, match="`label=…` is missing"):
        TrainConfig(name="m", training_set="t")
    assert new_run_id() != new_run_id()


@pytest.fixture
def process_group() -> Iterator[None]:
    """Let this process be the only rank of a group."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def due_steps(files: RunFiles, *, every_steps: int = 100, **questions: Callable[[], bool]) -> list[int]:
    """Return the steps, of a hundred, after which a checkpoint is due. Ray is asked whenever it can be."""
    config = CheckpointConfig(every_s=None, every_steps=every_steps, watch_s=1e-9)
    saver = Saver(files, config, Rank(), **questions)
    return [step for step in range(1, 101) if saver._is_due(LoopState(step=step), device=torch.device("cpu"))]


@pytest.mark.usefixtures("process_group")
def test_a_notice_that_a_node_ends_leads_to_one_checkpoint(tmp_path: Path, access: KeyAccess) -> None:
    """Ray is asked every few seconds, and not any more after the notice."""
    answers = [False, True]
    files = run_files(str(tmp_path), model="m", run="a", access=access)
    assert due_steps(files, ask_draining=lambda: answers.pop(0)) == [2 * DECIDE_STEPS, 100]


@pytest.mark.usefixtures("process_group")
def test_room_for_more_workers_leads_to_a_checkpoint(tmp_path: Path, access: KeyAccess) -> None:
    """The run then starts again with more workers."""
    answers = [False, True] + [False] * 20
    files = run_files(str(tmp_path), model="m", run="a", access=access)
    assert due_steps(files, has_room=lambda: answers.pop(0)) == [2 * DECIDE_STEPS, 100]


@pytest.mark.usefixtures("process_group")
def test_room_is_asked_for_also_with_a_checkpoint_after_each_step(tmp_path: Path, access: KeyAccess) -> None:
    """Each of the steps after which rank 0 could ask is then one with a checkpoint."""
    asked: list[int] = []

    def has_room() -> bool:
        asked.append(1)
        return False

    files = run_files(str(tmp_path), model="m", run="a", access=access)
    due = due_steps(files, every_steps=1, has_room=has_room)
    assert due == list(range(1, 101))
    assert len(asked) == 100 // DECIDE_STEPS


def test_an_incomplete_checkpoint_is_not_the_newest(tmp_path: Path, access: KeyAccess) -> None:
    """A killed attempt has a later name and other weights. The weights of the complete checkpoint are kept."""
    files = run_files(str(tmp_path), model="m", run="a", access=access)
    complete = CheckpointName(epoch=2, step=0, best_epoch=0, attempt="a")
    for name in (complete, CheckpointName(epoch=2, step=0, best_epoch=1, attempt="b")):
        files.write(f"checkpoints/{name.text()}/rank-0", b"state")
        files.write(best_path(name.best_epoch), b"weights")
    write_manifest(files, complete, workers=1, parts=["rank-0"])
    assert newest_complete(files) == complete
    remove_old(files, keep=1)
    assert files.read(best_path(newest_complete(files).best_epoch)) == b"weights"


def test_two_runs_are_compared(ledger: Ledger, tmp_path: Path, access: KeyAccess) -> None:
    """The table has settings that differ, losses by step, and metrics. The plot is SVG."""
    for run, seed, auc in (("a", 0, 0.7), ("b", 1, 0.8)):
        start(ledger, run, seed=seed)
        metrics = [
            {"epoch": 0, "step": step, "values": {"training_loss": auc / step}, "rows_per_s": 1.0}
            for step in range(1, 31)
        ]
        run_files(str(tmp_path), model="m", run=run, access=access).write(
            "metrics/000000-000000030", json.dumps(metrics).encode()
        )
        record_finished(ledger, model="m", run=run, result=Finished(1, {"auc": auc}), actor="me")
    runs = [read_run(ledger, run, root=str(tmp_path), access=access) for run in ("a", "b")]
    lines = comparison_table(runs)
    assert lines[0].split() == ["a", "b"]
    assert lines[1].split() == ["seed", "0", "1"]
    assert lines[-1].split() == ["auc", "0.7", "0.8"]
    assert "training_loss, epoch 1 step 30" in lines[-2]
    assert len(lines) < 20
    assert comparison_plot(runs).count("<polyline") == 2
    with pytest.raises(ConfigError, match="No run 'c'"):
        read_run(ledger, "c", root=str(tmp_path), access=access)
