"""`python -m jobs.monitor name=m reference=train.parquet label=y`: estimate, realise, look for drift, per variant.

NannyML runs in a Ray task, so that the job shows on the dashboard and takes its place among the cluster's CPUs.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from typing import Any

import polars as pl
import ray

from cluster.entrypoint import job
from cluster.errors import RefusedError, TrainingSetError
from cluster.ledger import open_ledger
from cluster.ledger.events import ModelMonitored
from cluster.records import read_outcomes, read_predictions
from cluster.registry import ModelVersion, Registry
from cluster.runtime import Task, load_model
from cluster.security.acting import act
from cluster.security.keys.access import KeyAccess, key_store, protected_files
from cluster.security.keys.store import KeyStore
from cluster.session import attach
from cluster.storage import exists, file_name, layout, local, resolve, sha256, write_bytes
from jobs.monitor.chunks import CHUNK, cut
from jobs.monitor.config import MonitorConfig, SplitConfig
from jobs.monitor.frames import build
from jobs.monitor.measures import METRICS, SHORT, Measures, drift, estimated, realised
from jobs.monitor.plots import performance_plot
from jobs.train.data import read_training_set


@job("monitor", MonitorConfig)
def main(config: MonitorConfig) -> None:
    """Measure every variant and write results, plots and events."""
    reference_uri = resolve(config.reference)
    if not exists(reference_uri):
        raise TrainingSetError(f"No reference at {reference_uri}. Give the training set of the model.")
    ledger = open_ledger(config)
    actor = act(config, attach(config), ledger, entrypoint="jobs.monitor")
    files = protected_files(actor.access)
    places = layout(config.storage)
    registry = Registry(ledger, places)
    source = read_training_set(config.reference, files, places=places, ledger=ledger)
    reference = held_out(pl.DataFrame(pl.from_arrow(source.table)), config)
    run = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    results: dict[str, Any] = {}
    for (variant, number), rows in logged(config, key_store(actor.access)).group_by(
        "variant", "version", maintain_order=True
    ):
        version = registry.get(config.name, int(str(number)))
        figures = measure(config, version, reference, rows, access=actor.access)
        results[str(variant)] = figures
        print(describe(str(variant), figures), flush=True)
        folder, file = f"{places.monitor(config.name)}/{run}", file_name(str(variant))
        write_bytes(f"{folder}/{file}.json", json.dumps(figures, indent=1).encode())
        if figures["periods"]:
            plot = performance_plot(str(variant), figures["periods"], metric=figures["metric"])
            write_bytes(f"{folder}/{file}.svg", plot.encode())
        identities = "".join(sorted(rows["prediction_id"].to_list()))
        event = ModelMonitored(
            model=config.name,
            variant=str(variant),
            version=version.version,
            periods=figures["periods"],
            drift=drifted(figures),
            inputs={
                "reference": sha256(reference_uri),
                "predictions": hashlib.sha256(identities.encode()).hexdigest(),
            },
            results=f"{run}/{file}.json",
        )
        ledger.append(event, actor=actor.name)
    if config.output is not None:
        content = {"variants": {name: one["periods"] for name, one in results.items()}, "details": results}
        write_bytes(resolve(config.output), json.dumps(content, indent=1).encode())


def logged(config: MonitorConfig, store: KeyStore) -> pl.DataFrame:
    """Predictions with their outcomes where known.

    Raises:
        RefusedError: nothing was predicted yet.
    """
    places = layout(config.storage)
    predictions = read_predictions(local(places.predictions(config.name)), store)
    if predictions.is_empty():
        raise RefusedError(f"No prediction of '{config.name}' is logged: no data, so no statement.")
    outcomes = read_outcomes(local(places.outcomes(config.name)), store)
    if outcomes.is_empty():
        return predictions.with_columns(outcome=pl.lit(None))
    known = outcomes.select("prediction_id", "row", "outcome")
    return predictions.join(known, on=["prediction_id", "row"], how="left")


def held_out(reference: pl.DataFrame, config: MonitorConfig) -> pl.DataFrame:
    """The reference's rows that the model was not fitted on, in order of time.

    Raises:
        TrainingSetError: a column is missing, or no row is left.
    """
    split = config.split or SplitConfig(column=None)
    for name in (config.timestamp, split.column):
        if name is not None and name not in reference.columns:
            raise TrainingSetError(
                f"The reference has no column '{name}'; set `timestamp` and `split.column` to fit."
            )
    if split.column is not None:
        reference = reference.filter(pl.col(split.column) % split.modulo == split.remainder)
    if reference.is_empty():
        raise TrainingSetError(f"No reference row has {split.column} % {split.modulo} == {split.remainder}.")
    return reference.sort(config.timestamp)


def measure(
    config: MonitorConfig,
    version: ModelVersion,
    reference: pl.DataFrame,
    rows: pl.DataFrame,
    *,
    access: KeyAccess,
) -> dict[str, Any]:
    """All figures of one variant by chunk; too few rows give none and say so."""
    head = {
        "version": version.version,
        "metric": SHORT[METRICS[Task(version.task)]],
        "rows": rows.height,
        "outcomes": int(rows["outcome"].is_not_null().sum()),
    }
    served = cut(rows, config.period, min_rows=config.min_rows)
    if served.is_empty():
        status = f"no chunk has {config.min_rows} rows: no statement"
        return head | {"status": status, "periods": {}, "drift": {}}
    values = ray.get(_measure.remote(version, access, reference, served, config.label, config.min_rows))
    return head | {"status": "measured"} | values


@ray.remote
def _measure(
    version: ModelVersion,
    access: KeyAccess,
    reference: pl.DataFrame,
    served: pl.DataFrame,
    label: str,
    min_outcomes: int,
) -> dict[str, Any]:
    model = load_model(version, key_store(access))
    frames = build(model=model, reference=reference, served=served, label=label)
    estimates, realisations = estimated(frames), realised(frames, min_outcomes=min_outcomes)
    name = SHORT[METRICS[frames.task]]
    periods = {}
    for chunk in frames.chunks:
        of_chunk = served.filter(pl.col(CHUNK) == chunk)
        periods[chunk] = {
            f"estimated_{name}": _value(estimates, chunk),
            f"realised_{name}": _value(realisations, chunk),
            "rows": of_chunk.height,
            "outcomes": int(of_chunk["outcome"].is_not_null().sum()),
            "estimate": asdict(estimates[chunk]) if chunk in estimates else None,
            "realisation": asdict(realisations[chunk]) if chunk in realisations else None,
        }
    distances = {
        column: {chunk: asdict(one) for chunk, one in by_chunk.items()}
        for column, by_chunk in drift(frames).items()
    }
    return {"periods": periods, "drift": distances}


def _value(measures: Measures, chunk: str) -> float | None:
    return measures[chunk].value if chunk in measures else None


def drifted(figures: dict[str, Any]) -> dict[str, list[str]]:
    """Column to the chunks in which it left its threshold."""
    found = {
        name: [chunk for chunk, one in by_chunk.items() if one["alert"]]
        for name, by_chunk in figures["drift"].items()
    }
    return {name: chunks for name, chunks in found.items() if chunks}


def describe(variant: str, figures: dict[str, Any]) -> str:
    """One line for people."""
    if not figures["periods"]:
        return f"{variant}: {figures['status']}"
    metric = figures["metric"]
    shown = [
        f"{chunk} {_shown(one[f'estimated_{metric}'])} / {_shown(one[f'realised_{metric}'])}"
        for chunk, one in figures["periods"].items()
    ]
    return f"{variant}: {metric} estimated / realised: {', '.join(shown)}"


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
