"""`make bench BENCH=monitor`: monitoring of logged answers, beside plain NannyML with the same rows.

- `published`: the AUC that NannyML's documentation prints for its car loans, by chunk of 5,000 rows.
- `rows`: two million logged answers with outcomes, in the encrypted and compacted log of a model with 7 inputs. `falaj`
  the command `jobs.monitor`. `nannyml` is a process that reads the same rows from plain Parquet, with scores. It
  computes the same figures: CBPE, realised AUC, drift of each input and of the score, and PCA drift. They take turns.
  Both are wall times of whole processes. `again` is a second run of the command.
- `memory`: growth of the memory of the cluster and the command, for 500,000 and for 5 million answers.

    python tests/bench/monitor.py --plain REFERENCE ROWS    (plain NannyML; the benchmark runs it as a process)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.registry import Registry
from cluster.runtime import Task, load_model
from cluster.security.keys.access import key_store
from cluster.storage import layout
from jobs.monitor.calculation.fit import fit_reference
from jobs.monitor.calculation.frames import PREDICTED as FRAME_PREDICTED
from jobs.monitor.calculation.frames import SCORE as FRAME_SCORE
from jobs.monitor.calculation.frames import TIME as FRAME_TIME
from jobs.monitor.calculation.frames import TRUTH, Frames
from jobs.monitor.calculation.nannyml_api import import_nannyml
from jobs.monitor.calculation.performance import estimate_performance, realised_performance
from tests.bench._monitor_log import INPUTS, LABEL, PREDICTED, SCORE, TIME, write_log, write_plain
from tests.bench._scale_rows import Memory
from tests.integration.conftest import Project, new_project

ROWS, FEW, MANY, CHUNK_ROWS, CHUNKS = 2_000_000, 500_000, 5_000_000, 5_000, 10
PUBLISHED = (0.970744, 0.961316)
"""Estimated AUC of the first and of the last chunk of the analysis, in NannyML's documentation."""


def car_loans() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return NannyML's car loans: the reference, and the analysis with its labels."""
    reference, analysis, targets = import_nannyml().load_synthetic_car_loan_dataset()
    return reference, analysis.drop(columns=LABEL, errors="ignore").join(targets[[LABEL]])


def published_auc() -> dict[str, Any]:
    """Estimate the AUC of each chunk of the car loans, as `jobs.monitor` does: one fit, and one call for each chunk."""
    frames = []
    for rows in car_loans():
        day = pd.Timestamp("2000-01-01") + pd.to_timedelta(np.arange(len(rows)) // CHUNK_ROWS, unit="D")
        frames.append(
            pd.DataFrame(
                {
                    FRAME_SCORE: rows[SCORE],
                    FRAME_PREDICTED: rows[PREDICTED],
                    TRUTH: rows[LABEL],
                    "car_value": rows["car_value"],
                    FRAME_TIME: day,
                }
            )
        )
    reference, served = frames
    names = [f"[{start}:{start + CHUNK_ROWS - 1}]" for start in range(0, CHUNKS * CHUNK_ROWS, CHUNK_ROWS)]
    whole = Frames(
        task=Task.binary,
        reference=reference,
        served=served,
        chunks=names,
        continuous=["car_value"],
        categorical=[],
    )
    fit = fit_reference(whole)
    estimated = estimate_performance(whole, fit.estimator).measures
    realised = realised_performance(whole, fit.calculator, min_outcomes=300).measures
    return {name: {"estimated": estimated[name].value, "realised": realised[name].value} for name in names}


def plain(reference_path: Path, path: Path) -> None:
    """Compute the figures with NannyML alone."""
    nannyml = import_nannyml()
    reference, rows = pd.read_parquet(reference_path), pd.read_parquet(path)
    time_of = {"timestamp_column_name": TIME, "chunk_period": "D"}
    problem = {
        "y_true": LABEL, "y_pred": PREDICTED, "y_pred_proba": SCORE, "problem_type": "classification_binary",
        "metrics": ["roc_auc"],
    }  # fmt: skip
    inputs = list(INPUTS)
    estimates = nannyml.CBPE(**problem, **time_of).fit(reference).estimate(rows).to_df()
    nannyml.PerformanceCalculator(**problem, **time_of).fit(reference).calculate(rows).to_df()
    methods = {"continuous_methods": ["jensen_shannon"], "categorical_methods": ["jensen_shannon"]}
    drift = nannyml.UnivariateDriftCalculator(column_names=[*inputs, SCORE], **methods, **time_of)
    drift.fit(reference).calculate(rows).to_df()
    pca = nannyml.DataReconstructionDriftCalculator(column_names=inputs, **time_of)
    pca.fit(reference).calculate(rows).to_df()
    print(len(estimates))


def train(project: Project, model: str) -> None:
    """Train and register version 1 of a model."""
    project.run(
        "jobs.train", f"name={model}", "model=lightgbm", "model.rounds=50", "model.num_threads=1",
        f"label={LABEL}", "training_set=train.parquet", check=True,
    )  # fmt: skip


def scored(project: Project, model: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Return rows with the model's scores and labels."""
    version = Registry(project.ledger(), layout(project.config.storage)).get(model, 1)
    predictions = load_model(version, key_store(project.owner)).predict(rows.select(INPUTS).to_arrow())
    return rows.with_columns(
        pl.Series(SCORE, predictions.scores), pl.Series(PREDICTED, predictions.labels()).cast(pl.Int64)
    )


def monitor(project: Project, model: str) -> float:
    """Run the command, and return its seconds."""
    started = time.perf_counter()
    project.run_python(
        "-m", "jobs.monitor", f"name={model}", "period=day", f"output={model}.json", check=True
    )
    return time.perf_counter() - started


def forget(project: Project, model: str) -> None:
    """Remove what monitoring keeps, so that the next run is a first one."""
    shutil.rmtree(project.storage_root / "monitor" / model, ignore_errors=True)


def run_plain(reference: Path, rows: Path) -> float:
    """Run plain NannyML in a process of its own, and return its seconds."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--plain", str(reference), str(rows)]
    subprocess.run(command, check=True, timeout=1800, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def peak_mib(project: Project, model: str) -> float:
    """Run the command, and return the growth of the memory of the cluster and of the command, in MiB."""
    forget(project, model)
    memory = Memory(cluster_id=project.record.cluster_id, command=os.getpid())
    before = memory.now()
    thread = threading.Thread(target=memory.watch)
    thread.start()
    monitor(project, model)
    memory.ended.set()
    thread.join()
    return (memory.peak - before) / 2**20


def measure(project: Project, turns: int, parts: list[str], rows: int) -> dict[tuple[str, str], float]:
    """Measure, and return the results by part and metric."""
    reference, analysis = (pl.from_pandas(frame.drop(columns="id", errors="ignore")) for frame in car_loans())
    times = pl.Series("event_timestamp", pd.to_datetime(reference[TIME]))
    reference = reference.with_columns(times.dt.replace_time_zone("UTC"))
    reference.select(*INPUTS, pl.col(LABEL).cast(pl.Int64), "event_timestamp").write_parquet(
        project.root / "train.parquet"
    )
    results: dict[tuple[str, str], float] = {}
    wanted = {"rows": [rows], "memory": [FEW, MANY]}
    for part in parts:
        for count in wanted[part]:
            model = f"loans{count}"
            train(project, model)
            base = scored(project, model, analysis)
            write_log(base, count, folder=project.storage_root, model=model, access=project.owner)
            print(f"{model}: log written", flush=True)
            if part == "memory":
                results[part, f"{model}_mib"] = peak_mib(project, model)
                print(f"{model}: {results[part, f'{model}_mib']:.0f} MiB", flush=True)
                continue
            plain_rows, plain_reference = project.root / "rows.parquet", project.root / "reference.parquet"
            write_plain(base, count, plain_rows)
            held_out = scored(project, model, reference).filter(pl.int_range(pl.len()) % 4 == 0)
            held_out.with_columns(
                pl.col("event_timestamp").dt.replace_time_zone(None).alias(TIME)
            ).write_parquet(plain_reference)
            seconds: dict[str, list[float]] = {"nannyml": [], "falaj": [], "again": []}
            for _ in range(turns):
                seconds["nannyml"].append(run_plain(plain_reference, plain_rows))
                forget(project, model)
                seconds["falaj"].append(monitor(project, model))
                seconds["again"].append(monitor(project, model))
                print({name: round(values[-1], 1) for name, values in seconds.items()}, flush=True)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            results |= {(part, f"{name}_s"): value for name, value in medians.items()}
            results[part, "times_nannyml"] = medians["falaj"] / medians["nannyml"]
            results[part, "again_share"] = medians["again"] / medians["falaj"]
    if "memory" in parts:
        few, many = (results["memory", f"loans{count}_mib"] for count in (FEW, MANY))
        results["memory", "times_few"] = many / few
    return results


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", nargs=2, type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--parts", nargs="*", choices=("rows", "memory"), default=["rows", "memory"])
    given = parser.parse_args()
    if given.plain:
        plain(*given.plain)
        return
    published = published_auc()
    for chunk, one in published.items():
        print(f"{chunk:15} estimated {one['estimated']:.6f} realised {one['realised']:.6f}", flush=True)
    measured: dict[tuple[str, str], float] = {}
    if given.parts:
        with tempfile.TemporaryDirectory(prefix="falaj-monitor-") as folder:
            project = new_project(Path(folder) / "project")
            project.up()
            try:
                measured = measure(project, given.turns, given.parts, given.rows)
            finally:
                project.run("cluster.down")
    for (part, metric), value in measured.items():
        print(f"{part:8} {metric:20} {value:12,.3f}")
    output = Path(".falaj/bench/monitor.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"case": part, "metric": metric, "value": value} for (part, metric), value in measured.items()]
    output.write_text(json.dumps({"published": published, "measured": rows}, indent=1))


if __name__ == "__main__":
    main()
