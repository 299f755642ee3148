"""Tests of training, sweep and evaluation on a real cluster, with a small data set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.artifact import open_file
from cluster.host import processes
from cluster.ledger.events import LedgerEvent, TrialFinished, TrialStarted
from cluster.security.keys.access import key_store
from jobs.train.run.files import RunFiles, run_files
from tests.servers.polling import wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import Project

ROWS = 2000
DATA = ("name=tiny", "training_set=tiny.parquet", "label=y")
SMALL = ("model.width=8", "model.depth=1", "model.epochs=2", "model.batch_size=256")


@pytest.fixture(scope="module")
def project(falaj_cluster: Project) -> Project:
    """Return the cluster's project with a training set in it."""
    draw = np.random.default_rng(0)
    age, code = draw.uniform(0, 90, ROWS), draw.integers(0, 3, ROWS)
    y = (age / 90 + code / 3 + draw.normal(0, 0.2, ROWS) > 0.9).astype(np.int64)
    table = pa.table({"person_id": np.arange(ROWS), "age": age, "code": [f"c{n}" for n in code], "y": y})
    pq.write_table(table, falaj_cluster.root / "tiny.parquet")
    return falaj_cluster


def output(project: Project, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((project.root / name).read_text())
    return content


def model_files(project: Project, version: int) -> set[str]:
    folder = Path(project.storage_root) / "models" / "tiny" / str(version)
    return {path.name for path in folder.iterdir()}


def test_trees_are_registered_and_evaluated(project: Project) -> None:
    """Evaluation on the held-out rows gives the metrics that training registered."""
    project.run("jobs.train", "model=lightgbm", *DATA, "output=trees.json", check=True)
    trees = output(project, "trees.json")
    assert trees["metrics"]["auc"] > 0.85
    version = f"version={trees['version']}"
    project.run("jobs.evaluate", *DATA[:2], version, "slices=[code]", "output=evaluated.json", check=True)
    evaluated = output(project, "evaluated.json")
    assert evaluated["metrics"] == trees["metrics"]
    assert sum(one["rows"] for one in evaluated["slices"]["code"].values()) == ROWS // 4


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_a_network_of_any_stage_is_exported_whole(project: Project, stage: str) -> None:
    """Two workers train with ZeRO stage 0 or 3. The registered files are complete and contain no pickle."""
    project.run(
        "jobs.train",
        "model=tabular_network",
        *DATA,
        *SMALL,
        f"deepspeed={stage}",
        "output=net.json",
        check=True,
    )
    network = output(project, "net.json")
    assert network["metrics"]["auc"] > 0.7
    files = model_files(project, network["version"])
    assert {"model.onnx", "model.safetensors", "model.json"} <= files
    assert {Path(name).suffix for name in files} <= {".onnx", ".safetensors", ".json"}


LONG = ("model.width=8", "model.depth=1", "model.epochs=8", "model.batch_size=16")
EVERY_20 = ("checkpoint.every_steps=20", "checkpoint.log_every=1")


def weights(project: Project, version: int) -> bytes:
    path = project.storage_root / "models" / "tiny" / str(version) / "model.safetensors"
    return open_file(
        path.read_bytes(), name="tiny", version=version, part=path.name, store=key_store(project.owner)
    )


def wait_for_step(files: RunFiles, epoch: int, step: int) -> None:
    """Wait until a run has a checkpoint from this position on."""
    wait_until(lambda: any(name[:2] >= (epoch, step) for name in files.checkpoints()), seconds=180)


def training_workers(project: Project) -> list[psutil.Process]:
    return [
        process
        for process in processes.find(project.record.cluster_id)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]


def test_a_killed_run_ends_as_if_nothing_had_happened(project: Project) -> None:
    """A worker is killed inside an epoch, then the whole job, and then a worker is stopped by SIGSTOP.

    The same command ends with the weights of a whole run. Once it is finished, the command prints the version. With
    another setting, it is refused and names the setting.
    """
    arguments = ("model=tabular_network", *DATA, *LONG, *EVERY_20, "deepspeed=zero2")
    project.run("jobs.train", *arguments, "run=whole", "output=whole.json", check=True)
    limits = ("checkpoint.stall_after=5", "output=broken.json")
    command = [sys.executable, "-m", "jobs.train", *arguments, "run=broken", *limits]
    files = run_files(str(project.storage_root), model="tiny", run="broken", access=project.owner)
    with subprocess.Popen(command, cwd=project.root, env=project.env) as job:
        wait_for_step(files, 1, 20)
        training_workers(project)[0].kill()
        wait_for_step(files, 3, 20)
        job.kill()
    with subprocess.Popen(command, cwd=project.root, env=project.env) as job:
        wait_for_step(files, 5, 20)
        training_workers(project)[0].suspend()
        assert job.wait(180) == 0
    whole, broken = output(project, "whole.json"), output(project, "broken.json")
    assert broken["version"] != whole["version"]
    assert weights(project, broken["version"]) == weights(project, whole["version"])
    assert broken["metrics"] == whole["metrics"]
    again = project.run("jobs.train", *arguments, "run=broken", check=True)
    assert f"run broken is finished: tiny version {broken['version']}" in again.stdout
    other = project.run("jobs.train", *arguments, "run=broken", "seed=1")
    assert other.returncode == 2
    assert "started with seed=0, not 1" in other.stderr


HOLD_CPUS = (
    "import sys, time, ray; from cluster.session import attach; from cluster.settings import PlatformConfig; "
    "attach(PlatformConfig()); print('ready', flush=True); sys.stdin.readline(); "
    "task = ray.remote(num_cpus=4)(lambda: time.sleep(300)).remote(); print('waiting', flush=True); sys.stdin.read()"
)
"""After a line of input, it waits for four of the cluster's eight CPUs, and holds them until it ends."""


def test_a_run_loses_a_worker_and_its_cpus_and_gets_them_back(project: Project) -> None:
    """It goes on with one worker, then with two again. Without dropout, it ends with the loss of a run with two."""
    settings = ("model.epochs=12", "model.dropout=0", "deepspeed=zero1", "scaling.cpus_per_worker=3")
    arguments = ("model=tabular_network", *DATA, *LONG[:2], LONG[3], *EVERY_20, *settings)
    project.run("jobs.train", *arguments, "run=steady", "output=steady.json", check=True)
    command = [sys.executable, "-m", "jobs.train", *arguments, "scaling.num_workers=[1,2]", "run=elastic"]
    files = run_files(str(project.storage_root), model="tiny", run="elastic", access=project.owner)
    log = project.root / "elastic.log"
    options: dict[str, Any] = {"cwd": project.root, "env": project.env, "text": True}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        log.open("w") as out,
        subprocess.Popen([sys.executable, "-c", HOLD_CPUS], **options, **pipes) as holder,
    ):
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with subprocess.Popen(
            [*command, "checkpoint.watch_s=0.5", "output=elastic.json"], **options, stdout=out, stderr=out
        ) as job:
            wait_for_step(files, 0, 20)
            print(file=holder.stdin, flush=True)
            assert holder.stdout.readline() == "waiting\n"
            training_workers(project)[0].kill()
            wait_until(lambda: "1 of 1 to 2 workers" in log.read_text(), seconds=120)
            epoch, step, *_ = files.checkpoints()[0]
            wait_for_step(files, epoch, step + 1)
            holder.kill()
            assert job.wait(240) == 0, log.read_text()
    numbers = [line[0] for line in log.read_text().splitlines() if line.endswith("of 1 to 2 workers")]
    assert numbers == ["2", "1", "2"]
    steady, elastic = output(project, "steady.json")["metrics"], output(project, "elastic.json")["metrics"]
    assert elastic["log_loss"] == pytest.approx(steady["log_loss"], abs=1e-5)


def test_a_network_that_is_too_large_ends_in_one_line(project: Project) -> None:
    """The exit code is 1, the line names the settings to change, and Ray Train does not try again."""
    result = project.run("jobs.train", "model=tabular_network", *DATA, "model.width=3000000", "model.depth=2")
    assert result.returncode == 1, result.stderr
    assert "failed: A training worker has too little memory. Lower model.batch_size" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_killed_sweep_continues_from_the_ledger(project: Project) -> None:
    """The job is killed while its second trial runs. The same command runs only that one and the third.

    The finished sweep prints its best, which is trained and registered with the sweep as lineage. With another setting,
    the sweep is refused and names the setting.
    """
    options = ("run=s", "sweep.trials=3", "sweep.rows=500", "sweep.concurrent_trials=1", *SMALL[1:2])
    search = ("sweep.search=optuna", "sweep.scheduler=asha", "sweep.model.epochs=40")
    command = [sys.executable, "-m", "jobs.sweep", *DATA, *options, *search]
    ledger = project.ledger()

    def trials(kind: type[LedgerEvent]) -> list[tuple[int, Any]]:
        events = ledger.find(kind, model="tiny", run="s")
        return [(event.payload["trial"], event.payload.get("parameters")) for event in events]

    with subprocess.Popen(command, cwd=project.root, env=project.env) as job:
        wait_until(lambda: len(trials(TrialStarted)) == 2 or job.poll() is not None, seconds=120)
        job.kill()
    before = trials(TrialStarted)
    assert len(before) == 2
    done = project.run("jobs.sweep", *DATA, *options, *search, check=True)
    assert "3 trials, 1 have ended, 1 at once" in done.stdout
    ended = len(trials(TrialFinished))
    assert ended == 3
    started = trials(TrialStarted)
    assert [number for number, _ in started] == [1, 2, 2, 3]
    assert started[1] == started[2]
    outputs = ("output=sweep.json", "report=sweep.html", "register=true", "scaling.num_workers=1")
    again = project.run("jobs.sweep", *DATA, *options, *search, *outputs, check=True)
    assert "sweep s is finished" in again.stdout
    assert len(trials(TrialStarted)) == 4
    sweep = output(project, "sweep.json")
    assert sweep["best"] == dict(started)[sweep["best_trial"]]
    assert "polyline" in (project.root / "sweep.html").read_text()
    shown = project.run("cluster.lineage", "--model", "tiny", "--version", "latest", check=True).stdout
    assert f"hyper-parameters of trial {sweep['best_trial']} of sweep s" in shown
    other = project.run("jobs.sweep", *DATA, *options, *search, "seed=1")
    assert other.returncode == 2
    assert "Sweep 's' of model 'tiny' was started with seed=0, not 1" in other.stderr


def test_a_sweep_that_diverges_says_so_for_each_trial(project: Project) -> None:
    """No trial wins with a loss of NaN.

    The exit code is 1, each trial prints one line, and no file is written.
    """
    broken = ("model.weight_decay=1e30", "sweep.trials=1", "sweep.rows=200", *SMALL[1:2])
    result = project.run("jobs.sweep", *DATA, *broken, "output=none.json")
    assert result.returncode == 1, result.stderr
    *trials, failed = result.stderr.splitlines()
    assert [line[:7] for line in trials] == ["trial 1"], result.stderr
    assert all("loss is nan in epoch 1 of 1" in line for line in trials)
    assert "None of 1 trials has a finite validation_loss" in failed
    assert not (project.root / "none.json").exists()


def test_permuted_labels_teach_nothing(project: Project) -> None:
    """A version that is broken on purpose by permuted labels is evaluated with the true labels."""
    arguments = ("model=lightgbm", *DATA, "label_permutation=true", "output=broken.json")
    project.run("jobs.train", *arguments, check=True)
    assert output(project, "broken.json")["metrics"]["auc"] < 0.7


def test_a_decoder_is_registered_and_not_deployed(project: Project) -> None:
    """Two workers train on text files. The version has no pickle, and a second command with its run prints it."""
    draw = np.random.default_rng(0)
    (project.root / "texts").mkdir()
    for number in range(80):
        words = draw.choice(["the", "cat", "saw", "a", "dog", "bird"], 80)
        (project.root / "texts" / f"{number}.txt").write_text(" ".join(words))
    small = ("model.width=16", "model.depth=1", "model.heads=2", "model.length=64", "model.epochs=3")
    arguments = ("name=notes", "text=texts", *small, "run=first", "output=notes.json")
    trained = project.run("jobs.train_text", *arguments, check=True)
    assert "80 files" in trained.stdout
    decoder = output(project, "notes.json")
    assert 0 < decoder["metrics"]["bits_per_byte"] < 8
    folder = Path(project.storage_root) / "models" / "notes" / str(decoder["version"])
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "decoder.json", "manifest.json", "metrics.json", "model.safetensors",
    }  # fmt: skip
    again = project.run("jobs.train_text", *arguments, check=True)
    assert "run first is finished: notes version 1" in again.stdout
    refused = project.run("serve_apps.deploy", "name=notes")
    assert refused.returncode == 2
    assert refused.stderr.startswith("refused: notes version 1 is a language model"), refused.stderr
    wrong = project.run("jobs.train", "model=decoder", *DATA)
    assert wrong.returncode == 2
    assert "python -m jobs.train_text" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model=lightgbm", *DATA[:1], "training_set=none.parquet", "label=y"), "none.parquet"),
        (("model=lightgbm", *DATA[:2], "label=z"), "label 'z'"),
        (("model=lightgbm", *DATA[:2], "label=age"), "fractions"),
        (("model=lightgbm", *DATA, "model.family=forest"), "forest"),
        (("model=tabular_network", *DATA, "deepspeed.zero_stage=7"), "0-3"),
        (("model=lightgbm", *DATA, "params_from=none.json"), "none.json"),
        (("model=lightgbm", *DATA, "inputs=[age,age]"), "named twice"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    project: Project, arguments: tuple[str, ...], said: str
) -> None:
    """The exit code is 2, and the message says what to do."""
    result = project.run("jobs.train", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
