"""`python -m jobs.monitor model=m reference=train.parquet label=y`: estimate, realise, look for drift, per variant.

NannyML runs in a Ray task, so that the job shows on the dashboard and takes its place among the cluster's CPUs.
"""

from __future__ import annotations

import json
import time
from typing import Any

import polars as pl
import ray

from cluster.entrypoint import job
from cluster.errors import RefusedError, TrainingSetError
from cluster.ledger import open_ledger
from cluster.ledger.events import ModelMonitored
from cluster.records import read_outcomes, read_predictions
from cluster.registry import ModelVersion, Registry
from cluster.runtime.loader import load_model
from cluster.runtime.signature import Task
from cluster.security.identity import current_actor
from cluster.session import attach
from cluster.storage import exists, layout, local, read_parquet, resolve, sha256, write_bytes
from jobs.monitor.config import MonitorConfig
from jobs.monitor.frames import build, held_out
from jobs.monitor.measures import METRICS, drift, estimated, realised
from jobs.monitor.plots import performance_plot


@job("monitor", MonitorConfig)
def main(config: MonitorConfig) -> None:
    """Measure every variant and write results, plots and events."""
    reference_uri = resolve(config.reference)
    if not exists(reference_uri):
        raise TrainingSetError(f"No reference at {reference_uri}. Give the training set of the model.")
    attach(config)
    ledger = open_ledger(config)
    places = layout(config.storage)
    registry = Registry(ledger, places)
    served = logged(config)
    reference = held_out(pl.DataFrame(pl.from_arrow(read_parquet(reference_uri))), config.split)
    folder = f"{places.monitor(config.model)}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    results: dict[str, Any] = {}
    for (variant, number), rows in served.group_by("variant", "version", maintain_order=True):
        version = registry.get(config.model, int(str(number)))
        figures = measure(config, version, reference, rows)
        results[str(variant)] = figures | {"version": version.version}
        print(describe(str(variant), figures), flush=True)
        uri = f"{folder}/{variant}.json"
        write_bytes(uri, json.dumps(figures, indent=1).encode())
        if figures["periods"]:
            plot = performance_plot(str(variant), figures["periods"], metric=figures["metric"])
            write_bytes(f"{folder}/{variant}.svg", plot.encode())
        event = ModelMonitored(
            model=config.model,
            variant=str(variant),
            version=version.version,
            periods=figures["periods"],
            drift={name: alerts for name, alerts in drifted(figures).items() if alerts},
            inputs={"reference": sha256(reference_uri), "predictions": str(rows.height)},
            results=f"{variant}.json",
        )
        ledger.append(event, actor=current_actor())
    if config.output is not None:
        content = {"variants": {name: one["periods"] for name, one in results.items()}, "details": results}
        write_bytes(resolve(config.output), json.dumps(content, indent=1).encode())


def logged(config: MonitorConfig) -> pl.DataFrame:
    """Predictions with their outcomes where known.

    Raises:
        RefusedError: nothing was predicted yet.
    """
    places = layout(config.storage)
    predictions = read_predictions(local(places.predictions(config.model)))
    if predictions.is_empty():
        raise RefusedError(f"No prediction of '{config.model}' is logged: no data, so no statement.")
    outcomes = read_outcomes(local(places.outcomes(config.model)))
    if outcomes.is_empty():
        return predictions.with_columns(outcome=pl.lit(None))
    return predictions.join(
        outcomes.select("prediction_id", "row", "outcome"), on=["prediction_id", "row"], how="left"
    )


def measure(
    config: MonitorConfig, version: ModelVersion, reference: pl.DataFrame, rows: pl.DataFrame
) -> dict[str, Any]:
    """All figures of one variant, `periods` by year; too few rows give none and say so."""
    metric = METRICS[Task(version.task)]
    head = {"metric": metric, "rows": rows.height, "outcomes": int(rows["outcome"].is_not_null().sum())}
    if rows.height < config.min_rows:
        return head | {
            "status": f"too few rows: {rows.height} of {config.min_rows}",
            "periods": {},
            "drift": {},
        }
    values = ray.get(_measure.remote(version.uri, version.manifest_hash, reference, rows, config))
    return head | {"status": "measured"} | values


@ray.remote
def _measure(
    uri: str, manifest_hash: str, reference: pl.DataFrame, rows: pl.DataFrame, config: MonitorConfig
) -> dict[str, Any]:
    model = load_model(uri, manifest_hash)
    frames = build(
        model=model,
        reference=reference,
        served=rows,
        label=config.label,
        timestamp=config.timestamp,
        period=config.period,
    )
    estimates, realisations = estimated(frames), realised(frames)
    name = "auc" if METRICS[frames.task] == "roc_auc" else METRICS[frames.task]
    periods = {}
    for key, estimate in estimates.items():
        real = realisations.get(key)
        periods[period_name(key, config.period)] = {
            f"estimated_{name}": estimate["value"],
            f"realised_{name}": real["value"] if real else None,
            "rows": estimate["rows"],
            "outcomes": real["rows"] if real else 0,
            "estimate": estimate,
            "realisation": real,
        }
    return {"periods": periods, "drift": drift(frames)}


def period_name(key: str, period: str) -> str:
    """A monthly chunk that stands for its year, as yearly surveys give, is called by the year."""
    return key[:4] if period == "M" else key


def drifted(figures: dict[str, Any]) -> dict[str, list[str]]:
    """Feature to the chunks in which it left its threshold."""
    return {
        name: [key for key, one in chunks.items() if one["alert"]]
        for name, chunks in figures["drift"].items()
    }


def describe(variant: str, figures: dict[str, Any]) -> str:
    """One line for people."""
    if not figures["periods"]:
        return f"{variant}: {figures['status']}"
    parts = []
    for year, one in figures["periods"].items():
        values = [value for key, value in one.items() if key.startswith(("estimated_", "realised_"))]
        shown = " / ".join("no outcomes" if value is None else f"{value:.3f}" for value in values)
        parts.append(f"{year} {shown}")
    return f"{variant}: {figures['metric']} estimated / realised: {', '.join(parts)}"


if __name__ == "__main__":
    main()
