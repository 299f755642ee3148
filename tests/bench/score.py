"""`make bench BENCH=score`: batch scoring of 5 million rows, beside a loop in one thread with the same model.

The model has 200 trees and 24 inputs, 4 of them categories. The rows are plain Parquet, in files with row groups of a
million rows. `loop` reads batches of 65,536 rows, encodes them, predicts, and writes scores to Parquet, in one thread.
`falaj` is the command `jobs.score`, with its hash of the input, and with unencrypted output (`plain`) or with encrypted
output below the storage root (`protected`).

The systems take turns. The results are medians of the wall time of whole processes with their start. `start_s` is the
time of the command for a thousand rows in a Ray task; `times_loop_after_start` leaves it out. `peak_worker_mib` is the
largest growth of one process of the cluster while the command runs, `peak_worker_mib_few` for a million rows. It is
measured in runs of their own. Labels and scores of both systems must be equal, or the benchmark fails.

    python tests/bench/score.py --loop FOLDER INPUT OUTPUT    (the loop alone; the benchmark runs it as a process)
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.host import processes
from cluster.registry import Registry
from cluster.runtime import open_model
from cluster.runtime.loader import read_file
from cluster.security.keys.access import key_store
from cluster.storage import layout
from tests.bench._group import own_group
from tests.integration.conftest import Project, new_project

ROWS, FEW, TINY, GROUP = 5_000_000, 1_000_000, 1_000, 1_000_000
NUMBERS, CATEGORIES = 20, 4
BATCH = 65_536
FOLDERS = {"plain": "scores", "protected": ".falaj/jobs"}
UNITS = {"rows_per_s": "1/s", "times_loop": "1", "times_loop_after_start": "1", "start_s": "s"}
MODEL = ("name=bench", "model=lightgbm", "model.rounds=200", "model.num_threads=1", "label=y")


def rows(count: int, seed: int) -> pa.Table:
    """Return rows with all inputs."""
    draw = np.random.default_rng(seed)
    table = {"row_id": np.arange(count)}
    table |= {f"n{number}": draw.normal(size=count) for number in range(NUMBERS)}
    for number in range(CATEGORIES):
        codes = draw.integers(0, 12, count).astype(np.int8)
        table[f"c{number}"] = pa.DictionaryArray.from_arrays(codes, [f"v{code}" for code in range(12)])
    return pa.table(table)


def write_rows(folder: Path, count: int) -> Path:
    """Write rows as one file, and return its path."""
    path = folder / f"rows{count}.parquet"
    with pq.ParquetWriter(path, rows(1, 0).schema) as writer:
        for start in range(0, count, GROUP):
            writer.write_table(rows(min(GROUP, count - start), seed=start), row_group_size=GROUP)
    return path


def train(project: Project) -> Path:
    """Train and register the model. Return a folder with its files, unencrypted."""
    table = rows(50_000, seed=1)
    noise = np.random.default_rng(2).normal(size=table.num_rows)
    total = sum(table[f"n{number}"].to_numpy() for number in range(NUMBERS)) + noise
    table = table.append_column("y", pa.array((total > 0).astype(np.int64)))
    pq.write_table(table, project.root / "train.parquet")
    project.run("jobs.train", *MODEL, "training_set=train.parquet", check=True)
    version = Registry(project.ledger(), layout(project.config.storage)).get("bench", 1)
    folder = project.root / "plain_model"
    folder.mkdir()
    for name in version.files:
        (folder / name).write_bytes(read_file(version, name, key_store(project.owner)))
    return folder


def loop(folder: Path, source: Path, output: Path) -> None:
    """Score in one thread."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    model = open_model(folder)
    negative, positive = model.signature.classes or (0, 1)
    schema = pa.schema([("row_id", pa.int64()), ("probability", pa.float64()), ("label", pa.int64())])
    with pq.ParquetWriter(output, schema, compression="zstd") as writer:
        for batch in pq.ParquetFile(source).iter_batches(BATCH, use_threads=False):
            table = pa.Table.from_batches([batch])
            scores = model.predict(table).scores
            label = np.where(scores >= model.signature.threshold, positive, negative)
            writer.write_table(pa.table([table["row_id"], scores, label], schema=schema))


@contextmanager
def peak_memory(project: Project, peak: list[float]) -> Iterator[None]:
    """Append the largest growth of the memory of a process of the cluster, in MiB, and of new ones their memory."""
    before = {process.pid: process.memory_info().rss for process in processes.find(project.record.cluster_id)}
    largest, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not ended.wait(0.1):
            for process in processes.find(project.record.cluster_id):
                try:
                    memory = process.memory_info()
                except psutil.Error:
                    continue
                # Shared memory is Ray's object store.
                largest = max(largest, memory.rss - memory.shared - before.get(process.pid, 0))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        peak.append(largest / 2**20)


def run_falaj(project: Project, source: Path, output: str) -> float:
    """Run the command, and return its seconds."""
    started = time.perf_counter()
    project.run_python(
        "-m", "jobs.score", "name=bench", "version=1", f"input={source}", f"output={output}", "keep=[row_id]",
        "keep_inputs=false", "task_values=1", check=True,
    )  # fmt: skip
    return time.perf_counter() - started


def run_loop(folder: Path, source: Path, output: Path) -> float:
    """Run the loop in a process of its own, and return its seconds."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, __file__, "--loop", str(folder), str(source), str(output)], check=True, timeout=1800
    )
    return time.perf_counter() - started


def require_equal(project: Project, output: str, looped: Path) -> None:
    """Require that both systems gave the same scores and labels, bit for bit."""
    names = ["row_id", "probability", "label"]
    files = sorted((project.root / output).glob("part-*.parquet"))
    ours = pa.concat_tables(pq.read_table(file, columns=names) for file in files)
    assert ours.combine_chunks().equals(pq.read_table(looped, columns=names).combine_chunks()), "not equal"


def measure(project: Project, count: int, turns: int, cases: Sequence[str]) -> dict[tuple[str, str], float]:
    """Measure, and return the results by system and metric."""
    model = train(project)
    sources = {number: write_rows(project.root, number) for number in (TINY, min(FEW, count), count)}
    seconds: dict[str, list[float]] = {name: [] for name in ("loop", *cases)}
    peaks: list[float] = []
    start_s = statistics.median([run_falaj(project, sources[TINY], f"tiny{turn}") for turn in range(3)][1:])
    print(f"start {start_s:.1f} s", flush=True)
    for number in (
        min(FEW, count),
        count,
    ):  # apart from the timed runs, because the measurement needs much CPU time
        with peak_memory(project, peaks):
            run_falaj(project, sources[number], f"memory{number}")
        shutil.rmtree(project.root / f"memory{number}")
    for turn in range(turns):
        seconds["loop"].append(run_loop(model, sources[count], project.root / "loop.parquet"))
        print(f"loop {seconds['loop'][-1]:.1f} s", flush=True)
        for name in cases:
            output = f"{FOLDERS[name]}/{turn}"
            seconds[name].append(run_falaj(project, sources[count], output))
            print(f"{name} {seconds[name][-1]:.1f} s", flush=True)
            if name == "plain":
                require_equal(project, output, project.root / "loop.parquet")
            shutil.rmtree(project.root / output)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {(name, "rows_per_s"): count / value for name, value in medians.items()}
    for name in cases:
        results[name, "times_loop"] = medians["loop"] / medians[name]
        results[name, "times_loop_after_start"] = medians["loop"] / (medians[name] - start_s)
    results["plain", "start_s"] = start_s
    results["plain", "peak_worker_mib_few"], results["plain", "peak_worker_mib"] = peaks
    return results


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", nargs=3, type=Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=FOLDERS, default=list(FOLDERS))
    given = parser.parse_args()
    if given.loop:
        loop(*given.loop)
        return
    with own_group(), tempfile.TemporaryDirectory(prefix="falaj-score-") as folder:
        project = new_project(Path(folder) / "project")
        project.up()
        try:
            measured = measure(project, given.rows, given.turns, given.cases)
        finally:
            project.run("cluster.down")
    results: list[dict[str, Any]] = []
    for (name, metric), value in measured.items():
        print(f"{name:10} {metric:20} {value:12,.2f}")
        system, case = ("loop", "plain") if name == "loop" else ("falaj", name)
        unit = {"rows_per_s": "1/s", "times_loop": "1", "times_loop_after_start": "1", "start_s": "s"}.get(
            metric, "MiB"
        )
        results.append({"system": system, "case": case, "metric": metric, "value": value, "unit": unit})
    output = Path(".falaj/bench/score.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
