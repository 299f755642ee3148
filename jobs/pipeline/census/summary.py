"""Build the demo's summary from the ledger, the prediction log and the outputs of the stages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from cluster.ledger import Ledger, open_ledger
from cluster.ledger.chain import verify_chain
from cluster.ledger.events import BatchIngested, TrainingSetBuilt
from cluster.records.location import prediction_log
from cluster.records.reading import Log, read_log
from cluster.records.unit_hash import unit_hash, unit_key
from cluster.registry import Registry
from cluster.security.acting import create_actor
from cluster.security.edge_proof import edge_proof
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster
from cluster.storage import layout, write_json
from jobs.pipeline.config import PipelineConfig
from jobs.pipeline.report.runs import group_seconds
from jobs.pipeline.state import RunState

Summary = dict[str, Any]
CANDIDATES = {"champion": "train_lightgbm", "challenger": "train_network", "broken": "train_broken"}
"""For each variant, the stage that trained it."""


def summarise(config: PipelineConfig, run: RunState, demo: Path) -> Summary:
    """Build the summary of a run and write it as `summary.json` into the demo's folder."""
    places = layout(config.storage)
    ledger = open_ledger(config)
    name = variable(config, "name")
    answers = _answers(demo)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.pipeline")
    log = prediction_log(places, ledger, name)
    variants = _variants(name, Registry(ledger, places), run)
    summary = {
        "rows": _rows(ledger),
        "training_set": _training_set(ledger),
        "variants": variants,
        "requests": {
            "sent": answers.height,
            "errors": answers.filter(pl.col("status") != 200).height,
            "p50_ms": answers["latency_ms"].quantile(0.5),
            "p99_ms": answers["latency_ms"].quantile(0.99),
        },
        "shares": _shares(config, answers.filter(pl.col("batch") != "broken")),
        **count_logged(read_log(log, key_store(actor.access)), answers, key=unit_key(edge_proof(places))),
        "monitor": _monitor(select_versions(read_output(demo, "monitor"), variants)),
        "rollback_ms": read_output(demo, "check")["rollback_ms"],
        "ledger": {"verified": True, "events": sum(1 for _ in verify_chain(ledger.entries()))},
        "seconds": stage_seconds(run),
    }
    write_json(str(demo / "summary.json"), summary)
    return summary


def variable(config: PipelineConfig, name: str) -> Any:
    """Return one of the pipeline's values."""
    assert config.pipeline is not None, "The demo has a pipeline."
    return config.pipeline.vars[name]


def read_output(demo: Path, name: str) -> dict[str, Any]:
    """Return the JSON file that a stage wrote; empty if it does not exist."""
    path = demo / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def stage_seconds(run: RunState) -> dict[str, float]:
    """Return the duration of each stage, and of each group of stages."""
    return {
        name: round(sum(group_seconds(run, [stage.name for stage in stages])), 1)
        for name, stages in run.graph.groups().items()
    }


def count_logged(log: Log, answers: pl.DataFrame, *, key: bytes) -> dict[str, int]:
    """Count the logged predictions of the demo's own client.

    A prediction is the demo's own if the client received its id. A prediction for a person whose request got no answer
    is an orphan: it was logged, but the answer did not reach the client. Predictions of shadows are not counted.

    Args:
        log: Prediction log of the model.
        answers: One row for each request of the client, with `person_id` and `prediction_id` (null without an answer).
        key: Key of the units' hashes.

    Returns:
        `prediction_log_rows` (the demo's own predictions and orphans), `orphans`, `others` (predictions for other
        clients) and `without_score` (predictions that failed).
    """
    failed = answers.filter(pl.col("prediction_id").is_null())["person_id"].to_list()
    ids = set(answers["prediction_id"].drop_nulls().to_list())
    columns = ("prediction_id", "rollout", "unit_hash")
    rows = [] if log.answers.is_empty() else log.answers.select(columns).rows()
    units = {
        (rollout, unit_hash(key, rollout=rollout, unit=str(person).encode()))
        for rollout in {rollout for _, rollout, _ in rows}
        for person in failed
    }
    all_ids = {prediction_id for prediction_id, _, _ in rows}
    answered = all_ids & ids
    orphans = {prediction_id for prediction_id, rollout, unit in rows if (rollout, unit) in units} - ids
    unscored = 0 if log.failures.is_empty() else log.failures["prediction_id"].n_unique()
    return {
        "prediction_log_rows": len(answered | orphans),
        "orphans": len(orphans),
        "others": len(all_ids - answered - orphans),
        "without_score": unscored,
    }


def select_versions(output: dict[str, Any], variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the monitoring output with one version per variant: the version of this demo, else the newest version.

    Args:
        output: Output of `jobs.monitor`. An older release wrote only one version per variant, without a key for it.
        variants: The variants of the summary. Each has the version that this demo used.
    """
    selected: dict[str, dict[str, Any]] = {"variants": {}, "details": {}}
    for variant, details in output["details"].items():
        versions = {str(details["version"]): details} if "periods" in details else details
        demo_version = str(variants.get(variant, {}).get("version"))
        figures = versions[demo_version if demo_version in versions else max(versions, key=int)]
        selected["variants"][variant] = figures["periods"]
        selected["details"][variant] = figures
    return selected


def quarantine_reasons(ledger: Ledger) -> dict[str, dict[str, int]]:
    """Count quarantined rows by view and reason."""
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
    newest = ledger.last(TrainingSetBuilt)
    assert newest is not None, "The demo has built a training set."
    return {"rows": newest.payload["rows"], "hash": newest.payload["row_hash"]}


def _variants(name: str, registry: Registry, run: RunState) -> dict[str, dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {}
    for variant, stage in CANDIDATES.items():
        version = registry.get(name, run.stages[stage].result["version"])
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
    weight = float(variable(config, "challenger_weight")) / 100
    weights = {"champion": 1 - weight, "challenger": weight}
    return {
        variant: {
            "weight": weight,
            "share": answers.filter(pl.col("variant") == variant).height / answers.height,
        }
        for variant, weight in weights.items()
    }


def _monitor(output: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    names = ("estimated_auc", "realised_auc", "rows", "outcomes")
    return {
        variant: {year: {name: figures.get(name) for name in names} for year, figures in years.items()}
        for variant, years in output["variants"].items()
    }
