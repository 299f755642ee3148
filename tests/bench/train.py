"""`make bench BENCH=train`: Falaj's training beside plain torchrun with DeepSpeed, and beside plain LightGBM.

Each family is a case. Both systems train the same model on the same rows, with the same batch, two workers, ZeRO 1, and
a validation and a checkpoint at the end of each epoch. Falaj is the whole command `jobs.train` (`jobs.train_text` for
`decoder`) with encrypted rows and encrypted checkpoints. The peer reads plain Parquet, or plain text files, and writes
plain checkpoints; see `peers/torchrun_train.py` and `peers/lightgbm_train.py`.

Both print a line after each epoch (trees: each tenth round). `samples_per_s` is the number of rows between the first
and the last line, per second; a row of each tree round counts once. `start_s` is the time from the start of the command
to the first line, without one epoch. `whole_s` is the time of the whole command. For Falaj, it includes the checks of
the data, the evaluation, the export and the registration. The systems take turns, and the results are medians.
`times_peer` is the median of the ratios of `samples_per_s` of each turn.

So that other work on the machine slows both systems down equally, everything runs in one control group for CPU time
(as root, and not with `GROUP=0`), and the peer has the scheduling policy of the cluster's processes, SCHED_BATCH.
`--peer-policy normal` gives it the normal one, which makes no difference on a machine without other work.

    python tests/bench/train.py --families ft_transformer --turns 5
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.node.scheduling import wait_for_turn
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyInfo
from jobs.train.config import DeepSpeedConfig, LearningConfig
from jobs.train.data import TrainingSet
from jobs.train.decoder.batches import TextBatches
from jobs.train.decoder.corpus import read_corpus, split_corpus
from jobs.train.decoder.family import TextSignature
from jobs.train.families import resolve_family
from jobs.train.lightgbm import _settings
from jobs.train.network.engine import deepspeed_config
from jobs.train.network.plan import LoopConfig, plan_steps
from jobs.train.network.protocol import network_signature
from jobs.train.rows.encoded import Part
from jobs.train.training_data import prepare_rows
from tests.bench._group import own_group
from tests.integration.conftest import Project, new_project

PEERS = Path(__file__).parent / "peers"
WORKERS, GROUP_ROWS = 2, 65_536
KEY = "training_sets/bench/internal"
NUMBERS, CATEGORIES = 20, 4
LINE = re.compile(r"\s*(?:epoch|round) (\d+) of ")
LIBRARY = Path(os.__file__).parent
TEXTS = ("email", "json")
"""Folders of Python's standard library on which the decoder is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What one family is trained on, and for how long."""

    rows: int
    parameters: dict[str, Any]


CASES = {
    "tabular_network": Case(rows=1_500_000, parameters={"epochs": 4, "batch_size": 1024}),
    "ft_transformer": Case(rows=60_000, parameters={"epochs": 4, "batch_size": 1024}),
    "decoder": Case(
        rows=0, parameters={"epochs": 3, "batch_size": 16, "width": 64, "depth": 2, "length": 128}
    ),
    "lightgbm": Case(rows=500_000, parameters={"rounds": 201, "patience": 1000}),
}


class Timed(NamedTuple):
    """One run of a system."""

    samples_per_s: float
    start_s: float
    whole_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The commands of both systems for one case."""

    ours: list[str]
    peer: list[str]
    rows: int
    """Rows of an epoch or round."""
    checkpoints: Path


def rows(count: int) -> pa.Table:
    """Return rows with numbers, categories and a label."""
    draw = np.random.default_rng(0)
    numbers = draw.normal(size=(NUMBERS, count)).astype(np.float32)
    table: dict[str, Any] = {f"n{position}": values for position, values in enumerate(numbers)}
    for position in range(CATEGORIES):
        codes = draw.integers(0, 12, count).astype(np.int8)
        table[f"c{position}"] = pa.DictionaryArray.from_arrays(codes, [f"v{code}" for code in range(12)])
    table["y"] = (numbers[:5].sum(0) + draw.normal(size=count) > 0).astype(np.int64)
    return pa.table(table)


def prepare_table(project: Project, family: str, case: Case, folder: Path) -> Prepared:
    """Write the rows, encrypted for Falaj and as plain Parquet for the peer."""
    table, encrypted = rows(case.rows), folder / "rows.parquet"
    key_store(project.owner).ensure(KeyInfo(name=KEY))
    protected_files(project.owner).write(
        table, str(encrypted), Protection(default=KEY), row_group_rows=GROUP_ROWS
    )
    resolved = resolve_family({"family": family, **case.parameters})
    data = prepare_rows(
        LearningConfig(name=family, training_set=str(encrypted), label="y"),
        TrainingSet(table=table, manifest={}, hash=""),
    )
    work: dict[str, Any] = {"checkpoints": str(folder / "checkpoints")}
    for name, part in (("fit", Part.fit), ("validation", Part.validation)):
        chosen = table.filter(pa.array(data.parts == part))
        work[name] = str(folder / f"{name}.parquet")
        # Each rank reads its own groups, so all groups have the same size.
        groups = WORKERS * max(1, round(len(chosen) / GROUP_ROWS / WORKERS))
        pq.write_table(chosen, work[name], row_group_size=-(-len(chosen) // groups))
    signature = data.signature
    work["columns"] = {
        column.name: [str(value) for value in column.categories or ()] for column in signature.matrix_columns
    }
    ours = [
        "jobs.train", f"model={family}", f"name={family}", f"training_set={encrypted}", "label=y",
        f"scaling.num_workers={WORKERS}", *(f"model.{key}={value}" for key, value in case.parameters.items()),
    ]  # fmt: skip
    num_rows = int(data.fit.sum())
    if not resolved.is_network:
        work |= {
            "settings": _settings(signature, resolved.parameters, 0),
            "rounds": resolved.parameters.rounds,
            "every": 10,
            "model": str(folder / "trees.txt"),
        }
        peer = [sys.executable, str(PEERS / "lightgbm_train.py")]
        return prepared(ours, peer, work, folder, num_rows)
    config = plan_steps(num_rows, resolved.parameters, workers=[WORKERS], accumulation=1)
    # The peer's ranks have whole batches of their own rows only, so at most one step for each rank is missing there.
    work |= network_work(resolved, network_signature(data), config)
    return prepared(ours, torchrun(), work, folder, config.steps * config.batch_rows)


def prepare_text(project: Project, family: str, case: Case, folder: Path) -> Prepared:
    """Copy the texts, which both systems read as they are."""
    texts = folder / "texts"
    for name in TEXTS:
        shutil.copytree(
            LIBRARY / name, texts / name, ignore=shutil.ignore_patterns("*.pyc", "__pycache__", "tests")
        )
    resolved = resolve_family({"family": family, **case.parameters}, reads_text=True)
    parts = split_corpus(read_corpus(str(texts)), modulo=10, remainder=9, validation_share=0.05)
    batches = TextBatches(parts=parts, length=resolved.parameters.length)
    steps = plan_steps(batches.num_rows, resolved.parameters, workers=[WORKERS], accumulation=1)
    work = {
        "checkpoints": str(folder / "checkpoints"),
        "length": resolved.parameters.length,
        "fit": [document.path for document in parts.fit.documents],
        "validation": [document.path for document in parts.validation.documents],
        **network_work(resolved, TextSignature(), steps),
    }
    ours = [
        "jobs.train_text", "name=decoder", f"text={texts}", f"scaling.num_workers={WORKERS}",
        "evaluated_rows=64", *(f"model.{key}={value}" for key, value in case.parameters.items()),
    ]  # fmt: skip
    return prepared(ours, torchrun(), work, folder, steps.steps * steps.batch_rows)


def network_work(family: Any, signature: Any, steps: Any) -> dict[str, Any]:
    """Return the part of the peer's work that all networks have."""
    config = LoopConfig(
        module=family.module.__name__,
        parameters=family.parameters,
        signature=signature,
        batches=None,
        steps=steps,
        deepspeed=DeepSpeedConfig(),
        seed=0,
    )
    return {
        "module": config.module,
        "parameters": config.parameters,
        "signature": signature,
        "deepspeed": deepspeed_config(config, workers=WORKERS),
        "epochs": steps.epochs,
        "steps": steps.steps,
        "batch_rows": steps.batch_rows,
    }


def torchrun() -> list[str]:
    """Return the start of the peer's command."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORKERS}",
        str(PEERS / "torchrun_train.py"),
    ]  # fmt: skip


def prepared(ours: list[str], peer: list[str], work: dict[str, Any], folder: Path, num_rows: int) -> Prepared:
    """Write the peer's work, and return both commands."""
    file = folder / "work.pickle"
    file.write_bytes(pickle.dumps(work))
    return Prepared(
        ours=[sys.executable, "-m", *ours],
        peer=[*peer, str(file)],
        rows=num_rows,
        checkpoints=folder / "checkpoints",
    )


def run(
    command: list[str], project: Project, *, num_rows: int, prepare: Callable[[], None] | None = None
) -> Timed:
    """Run a command and time its lines.

    Args:
        command: The command.
        project: Gives the folder and the environment.
        num_rows: Rows of a line.
        prepare: Called in the new process before the command.

    Raises:
        RuntimeError: The command fails.
    """
    started = time.perf_counter()
    seen: list[tuple[int, float]] = []
    output: list[str] = []
    env = project.env | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=project.root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=prepare,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if found := LINE.match(line):
                seen.append((int(found[1]), time.perf_counter()))
    whole_s = time.perf_counter() - started
    if process.returncode or len(seen) < 2:
        raise RuntimeError(f"{command} exited {process.returncode}\n{''.join(output[-80:])}")
    (first, first_at), (last, last_at) = seen[0], seen[-1]
    unit_s = (last_at - first_at) / (last - first)
    return Timed(num_rows / unit_s, first_at - started - unit_s * first, whole_s)


def measure(
    project: Project, family: str, *, turns: int, folder: Path, is_batch: bool
) -> list[dict[str, Any]]:
    """Measure one case. `is_batch`: the peer has the policy SCHED_BATCH."""
    folder.mkdir()
    both = (prepare_text if family == "decoder" else prepare_table)(project, family, CASES[family], folder)
    peer = "lightgbm" if family == "lightgbm" else "torchrun"
    timed: dict[str, list[Timed]] = {"falaj": [], peer: []}
    for turn in range(turns):
        commands = {"falaj": both.ours, peer: both.peer}
        # Every second turn, the other system is first.
        for system in list(commands)[:: -1 if turn % 2 else 1]:
            prepare = wait_for_turn if is_batch and system == peer else None
            timed[system].append(run(commands[system], project, num_rows=both.rows, prepare=prepare))
            shutil.rmtree(both.checkpoints, ignore_errors=True)
            print(f"{family} {system}: {timed[system][-1]}", flush=True)
    shutil.rmtree(folder)
    results = [
        {"system": system, "case": family, "metric": metric, "value": value, "unit": unit}
        for system, runs in timed.items()
        for metric, unit in (("samples_per_s", "1/s"), ("start_s", "s"), ("whole_s", "s"))
        for value in [statistics.median(getattr(one, metric) for one in runs)]
    ]
    ratios = [ours.samples_per_s / theirs.samples_per_s for ours, theirs in zip(*timed.values(), strict=True)]
    ratio = {"metric": "times_peer", "value": statistics.median(ratios), "unit": "1"}
    return [*results, {"system": "falaj", "case": family, **ratio}]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peer-policy", choices=("batch", "normal"), default="batch")
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    with own_group(), tempfile.TemporaryDirectory(prefix="falaj-train-") as folder:
        project = new_project(Path(folder) / "project")
        project.up()
        try:
            for family in given.families:
                results += measure(
                    project,
                    family,
                    turns=given.turns,
                    folder=Path(folder) / family,
                    is_batch=given.peer_policy == "batch",
                )
        finally:
            project.run("cluster.down")
    for result in results:
        print(f"{result['case']:16} {result['system']:9} {result['metric']:14} {result['value']:14,.2f}")
    output = Path(".falaj/bench/train.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
