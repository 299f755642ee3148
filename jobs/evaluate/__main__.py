"""`python -m jobs.evaluate name=m version=1 training_set=t.parquet`: evaluate a version on held-out rows."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.ledger.events import ModelEvaluated
from cluster.registry import ModelVersion, Registry
from cluster.runtime import load_model
from cluster.runtime.device_choice import Hardware
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster
from cluster.storage import layout, resolve, write_json
from jobs.evaluate.config import EvaluateConfig, Rows
from jobs.evaluate.slices import slice_metrics, smallest_slice
from jobs.metrics import headline, score
from jobs.train.data import TrainingSet, read_training_set
from jobs.train.split import version_held_out_mask
from jobs.train.target import encode_target, label_column


@job("evaluate", EvaluateConfig, timed=True)
def main(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate one version and append the result to the ledger."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.evaluate")
    version = Registry(ledger, layout(config.storage)).get(config.name, config.version)
    # The registry shows the result with the version, so the actor needs the same right as to register a version.
    actor.check(Action.register_model, version.resource(region=config.cluster.region))
    model = load_model(version, key_store(actor.access), hardware=Hardware(num_threads=2))
    signature = model.signature
    source = read_training_set(
        config.training_set, protected_files(actor.access), places=layout(config.storage), ledger=ledger
    )
    table = select_rows(config, version, source)
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
    metric = headline(signature.task, metrics)
    print(f"evaluated {version.name} version {version.version} on {table.num_rows} rows: {metric}")
    output: dict[str, Any] = {
        "name": version.name,
        "version": version.version,
        "family": version.family,
        "metrics": metrics,
        "slices": slices,
        "smallest_slice": smallest_slice(slices),
    }
    if config.output is not None:
        write_json(resolve(config.output), output)
    return output


def select_rows(config: EvaluateConfig, version: ModelVersion, source: TrainingSet) -> pa.Table:
    """Return the rows to evaluate: all rows, or only the rows that the version's training held out."""
    if config.rows is Rows.all:
        return source.table
    advice = "Give the training set, or set `rows=all` for data that was not used in training."
    mask = version_held_out_mask(version, source, advice=advice)
    return source.table.filter(pa.array(mask))


if __name__ == "__main__":
    main()
