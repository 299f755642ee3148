"""`python -m jobs.evaluate name=m version=1`: evaluate a version on the rows that its training held out."""

from __future__ import annotations

from typing import Any

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.ledger.events import ModelEvaluated
from cluster.registry import ModelVersion, Registry
from cluster.runtime import Task, load_model
from cluster.runtime.device_choice import Hardware
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster
from cluster.storage import layout, resolve, write_json
from jobs.evaluate.config import EvaluateConfig, Rows
from jobs.evaluate.measuring import (
    measure_fairness_and_intervals,
    measure_inputs,
    measure_threshold,
    require_binary,
    required_values,
)
from jobs.evaluate.parity import measure_parity
from jobs.evaluate.report import describe
from jobs.evaluate.requirements import check_requirements, require_met
from jobs.evaluate.rows import score_rows, select
from jobs.evaluate.slices import slice_metrics, smallest_slice
from jobs.metrics import score
from jobs.parity import require_parity
from jobs.train.data import TrainingSet, read_training_set
from jobs.train.version_rows import held_out_rows, recorded_training_set, require_same_rows


@job("evaluate", EvaluateConfig, timed=True)
def main(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate one version and append the result to the ledger."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.evaluate")
    version = Registry(ledger, layout(config.storage)).get(config.name, config.version)
    # The registry shows the result with the version, so the actor needs the same right as to register a version.
    actor.check(Action.register_model, version.resource(region=config.cluster.region))
    path = config.training_set or recorded_training_set(version)
    store = key_store(actor.access)
    model = load_model(version, store, hardware=Hardware(num_threads=2))
    signature = model.signature
    require_binary(config, signature.task)
    source = read_training_set(
        path, protected_files(actor.access), places=layout(config.storage), ledger=ledger
    )
    if config.training_set is None:
        require_same_rows(version, source, path=path, option="training_set")
    rows = score_rows(model, choose_rows(config, version, source))
    metrics = score(rows.predictions, rows.target)
    intervals, fairness = measure_fairness_and_intervals(config, version, source, rows)
    threshold = measure_threshold(config, version, model, source, rows)
    attributions, robustness = measure_inputs(config, model, rows)
    slices = slice_metrics(
        rows.predictions,
        rows.target,
        table=rows.table,
        columns=list(config.slices),
        min_rows=config.min_slice_rows,
    )
    event = ModelEvaluated(
        name=version.name,
        version=version.version,
        data_hash=source.hash,
        rows=rows.table.num_rows,
        metrics=metrics,
        slices=slices,
        chosen_rows=config.rows.value,
        intervals=intervals,
        fairness=fairness,
        threshold=threshold,
        robustness=robustness,
        attributions=attributions,
        parity=measure_parity(
            version,
            store,
            rows.matrix,
            rows.predictions.scores,
            precision=signature.precision,
            is_number=signature.task is Task.regression,
        ),
        requirements=check_requirements(config.require, required_values(metrics, fairness, threshold)),
    )
    ledger.append(event, actor=actor.name)
    for line in describe(event, signature):
        print(line, flush=True)
    output = event.payload() | {"family": version.family, "smallest_slice": smallest_slice(slices)}
    if config.output is not None:
        write_json(resolve(config.output), output)
    require_parity(event.parity, model=f"{version.name} version {version.version}")
    require_met(event.requirements, model=f"{version.name} version {version.version}")
    return output


def choose_rows(config: EvaluateConfig, version: ModelVersion, source: TrainingSet) -> Any:
    """Return the rows to evaluate: all rows, or only the rows that the version's training held out."""
    if config.rows is Rows.all:
        return source.table
    advice = "Give the training set, or set `rows=all` for data that was not used in training."
    return select(source, held_out_rows(version, source, advice=advice))


if __name__ == "__main__":
    main()
