"""`python -m jobs.evaluate name=m version=1 training_set=t.parquet`: score a version on rows it has never seen."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.ledger.events import ModelEvaluated
from cluster.registry import ModelVersion, Registry
from cluster.runtime import load_model
from cluster.runtime.hardware import Hardware
from cluster.security.acting import act
from cluster.security.keys.access import key_store, protected_files
from cluster.security.policy import Action
from cluster.session import require_record
from cluster.storage import layout, resolve, write_bytes
from jobs.evaluate.config import EvaluateConfig, Rows
from jobs.evaluate.metrics import headline, score
from jobs.evaluate.slices import slice_metrics, smallest_slice
from jobs.train.config import SplitConfig
from jobs.train.data import held_out_mask, label_column, read_training_set
from jobs.train.target import encode_target


@job("evaluate", EvaluateConfig, timed=True)
def main(config: EvaluateConfig) -> None:
    """Evaluate one version."""
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="jobs.evaluate")
    version = Registry(ledger, layout(config.storage)).get(config.name, config.version)
    # What is found becomes part of what the registry says of the version.
    actor.check(Action.register_model, version.resource(region=config.cluster.region))
    model = load_model(version, key_store(actor.access), hardware=Hardware(num_threads=2))
    signature = model.signature
    places = layout(config.storage)
    source = read_training_set(
        config.training_set, protected_files(actor.access), places=places, ledger=ledger
    )
    table = chosen_rows(config, version, source.table)
    labels = label_column(table, signature.label)
    target = encode_target(signature.task, labels, classes=signature.classes, label=signature.label)
    predictions = model.predict(table)
    metrics = score(predictions, target)
    slices = slice_metrics(
        predictions, target, table=table, columns=list(config.slices), min_rows=config.min_slice_rows
    )
    event = ModelEvaluated(
        name=version.name,
        version=version.version,
        data_hash=source.hash,
        rows=table.num_rows,
        metrics=metrics,
        slices=slices,
    )
    ledger.append(event, actor=actor.name)
    name, value = headline(signature.task, metrics)
    print(f"evaluated {version.name} version {version.version} on {table.num_rows} rows: {name} {value:.4f}")
    if config.output is not None:
        result: dict[str, Any] = {
            "metrics": metrics,
            "slices": slices,
            "smallest_slice": smallest_slice(slices),
        }
        head = {"name": version.name, "version": version.version, "family": version.family}
        write_bytes(resolve(config.output), json.dumps(head | result, indent=1).encode())


def chosen_rows(config: EvaluateConfig, version: ModelVersion, table: pa.Table) -> pa.Table:
    """The rows to evaluate: those the version's own training held out, or all."""
    if config.rows is Rows.all:
        return table
    recorded = version.lineage.config.get("split", {})
    split = SplitConfig(
        **{each.name: recorded[each.name] for each in fields(SplitConfig) if each.name in recorded}
    )
    mask = held_out_mask(split, table, seed=version.lineage.seed)
    return table.filter(pa.array(np.asarray(mask)))


if __name__ == "__main__":
    main()
