"""What the demo's run amounts to, read back from the ledger, the logs and the stages' own outputs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from cluster.ledger import Ledger, open_ledger
from cluster.ledger.chain import check
from cluster.ledger.events import BatchIngested, TrainingSetBuilt
from cluster.records import read_predictions
from cluster.registry import Registry
from cluster.security.acting import act
from cluster.security.keys.access import key_store
from cluster.session import require_record
from cluster.storage import layout, local, write_json
from jobs.pipeline.config import PipelineConfig
from jobs.pipeline.runner import Runner

Summary = dict[str, Any]
CANDIDATES = {"champion": "lightgbm", "challenger": "network", "broken": "broken"}
"""Variant to the output of the job that trained it."""


def summarise(config: PipelineConfig, runner: Runner, demo: Path) -> Summary:
    """The contract's `summary.json`, written below the demo's folder."""
    places = layout(config.storage)
    ledger = open_ledger(config)
    results = runner.results()
    answers = _answers(demo)
    actor = act(config, require_record(config), ledger, entrypoint="jobs.pipeline")
    log = local(places.predictions(config.name))
    predictions = read_predictions(log, key_store(actor.access))
    summary = {
        "rows": _rows(ledger),
        "training_set": _training_set(ledger),
        "variants": _variants(config, Registry(ledger, places), results),
        "requests": {
            "sent": answers.height,
            "errors": answers.filter(pl.col("status") != 200).height,
            "p50_ms": answers["latency_ms"].quantile(0.5),
            "p99_ms": answers["latency_ms"].quantile(0.99),
        },
        "shares": _shares(config, answers.filter(pl.col("batch") != "broken")),
        **logged(predictions, answers),
        "monitor": _monitor(results["monitor"]),
        "rollback_ms": results["check"]["rollback_ms"],
        "ledger": {"verified": True, "events": sum(1 for _ in check(ledger.entries()))},
        "seconds": {name: round(done.seconds, 1) for name, done in runner.finished.items()},
    }
    write_json(str(demo / "summary.json"), summary)
    return summary


def logged(predictions: pl.DataFrame, answers: pl.DataFrame) -> dict[str, int]:
    """Logged predictions, and those of them whose answer never left; what shadows predicted is in neither.

    Args:
        predictions: as `read_predictions` gives them, a row for each entity.
        answers: that clients got, with their `prediction_id`.
    """
    orphans = predictions.join(answers, on="prediction_id", how="anti")
    return {
        "prediction_log_rows": predictions["prediction_id"].n_unique(),
        "orphans": orphans["prediction_id"].n_unique(),
    }


def quarantine_reasons(ledger: Ledger) -> dict[str, dict[str, int]]:
    """Quarantined rows by view and reason."""
    reasons: dict[str, Counter[str]] = {}
    for entry in ledger.entries(BatchIngested):
        reasons.setdefault(entry.payload["view"], Counter()).update(entry.payload["reasons"])
    return {view: dict(counts) for view, counts in reasons.items()}


def _rows(ledger: Ledger) -> dict[str, dict[str, int]]:
    rows: dict[str, dict[str, int]] = {}
    for entry in ledger.entries(BatchIngested):
        batch = entry.payload
        view = rows.setdefault(batch["view"], {"ingested": 0, "stored": 0, "quarantined": 0})
        view["ingested"] += batch["rows_in"]
        view["stored"] += batch["rows_stored"]
        view["quarantined"] += batch["rows_quarantined"]
    return rows


def _training_set(ledger: Ledger) -> dict[str, Any]:
    *_, last = ledger.entries(TrainingSetBuilt)
    return {"rows": last.payload["rows"], "hash": last.payload["row_hash"]}


def _variants(
    config: PipelineConfig, registry: Registry, results: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {}
    for variant, output in CANDIDATES.items():
        version = registry.get(config.name, results[output]["version"])
        variants[variant] = {
            "family": version.family,
            "version": version.version,
            "auc": version.metrics["auc"],
            "accuracy": version.metrics["accuracy"],
        }
    return variants


def _answers(demo: Path) -> pl.DataFrame:
    frames = [
        pl.read_parquet(path).with_columns(batch=pl.lit(path.stem.removeprefix("answers_")))
        for path in sorted(demo.glob("answers_*.parquet"))
    ]
    return pl.concat(frames)


def _shares(config: PipelineConfig, answers: pl.DataFrame) -> dict[str, dict[str, float]]:
    weights = {"champion": 1 - config.challenger_weight / 100, "challenger": config.challenger_weight / 100}
    return {
        variant: {
            "weight": weight,
            "share": answers.filter(pl.col("variant") == variant).height / answers.height,
        }
        for variant, weight in weights.items()
    }


def _monitor(output: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    keep = ("estimated_auc", "realised_auc", "rows", "outcomes")
    return {
        variant: {year: {name: figures.get(name) for name in keep} for year, figures in years.items()}
        for variant, years in output["variants"].items()
    }
