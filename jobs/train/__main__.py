"""`python -m jobs.train model=lightgbm name=m training_set=t.parquet label=y`: fit, score, register."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import open_ledger
from cluster.registry import Registry
from cluster.runtime import open_model
from cluster.runtime.signature import SIGNATURE_FILE
from cluster.security.acting import act
from cluster.security.keys.access import key_store, protected_files
from cluster.security.policy import Action, Resource
from cluster.security.scratch import memory_folder, scratch
from cluster.session import attach, require_record
from cluster.storage import exists, layout, local, read_bytes, resolve, write_bytes
from jobs.evaluate.metrics import headline, score
from jobs.train.config import TrainConfig
from jobs.train.data import Dataset, prepare, read_training_set
from jobs.train.families import FitContext, resolve_family
from jobs.train.lineage import lineage, plain


@job("train", TrainConfig)
def main(config: TrainConfig) -> None:
    """Train one version and register it."""
    family, module, parameters = resolve_family(with_best(config))
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="jobs.train")
    model = Resource(kind="model", name=config.name, region=config.cluster.region)
    actor.check(Action.train_model, model)
    actor.check(Action.register_model, model)
    places = layout(config.storage)
    source = read_training_set(
        config.training_set, protected_files(actor.access), places=places, ledger=ledger
    )
    dataset = prepare(config, source, threshold=config.threshold)
    attach(config)
    runs = local(f"{places.root}/runs")
    # What a run keeps for itself may be for several machines; the model, which is in the clear until it is registered,
    # is this process's.
    with scratch(runs) as temporary, scratch(memory_folder(otherwise=runs)) as folder:
        context = FitContext(
            folder=folder,
            runs=str(temporary),
            seed=config.seed,
            scaling=config.scaling,
            deepspeed=config.deepspeed,
            run_name=f"{config.name}-{family}-{int(time.time())}",
        )
        learned = permuted(dataset, seed=config.seed) if config.label_permutation else dataset
        module.fit(learned, parameters, context)
        origin = lineage(config, source, parameters)
        (folder / SIGNATURE_FILE).write_text(dataset.signature.to_json())
        (folder / "config.json").write_text(json.dumps(plain(origin.config), indent=1))
        metrics = held_out_metrics(folder, dataset)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
        version = Registry(ledger, places).register(
            folder,
            name=config.name,
            family=family,
            task=config.task.value,
            lineage=origin,
            metrics=metrics,
            store=key_store(actor.access),
            actor=actor.name,
        )
    name, value = headline(config.task, metrics)
    print(f"registered {version.name} version {version.version} {name} {value:.4f}")
    if config.output is not None:
        result = {"name": version.name, "version": version.version, "family": family, "metrics": metrics}
        write_bytes(resolve(config.output), json.dumps(result, indent=1).encode())


def with_best(config: TrainConfig) -> dict[str, Any]:
    """The configured hyper-parameters, with a sweep's best in their place.

    Raises:
        ConfigError: the sweep's file is missing or holds no best parameters.
    """
    if config.params_from is None:
        return config.model
    uri = resolve(config.params_from)
    if not exists(uri):
        raise ConfigError(f"params_from={uri} does not exist. Run `python -m jobs.sweep … output={uri}`.")
    try:
        best = json.loads(read_bytes(uri))["best"]
    except (KeyError, TypeError, ValueError):
        best = None
    if not isinstance(best, dict):
        raise ConfigError(f"params_from={uri} holds no 'best' parameters; it must be the output of a sweep.")
    return config.model | best


def permuted(dataset: Dataset, *, seed: int) -> Dataset:
    """The same rows with their labels shuffled."""
    return replace(dataset, target=np.random.default_rng(seed).permutation(dataset.target))


def held_out_metrics(folder: Path, dataset: Dataset) -> dict[str, Any]:
    """The metrics of what was written, on rows it has never seen, under their true labels."""
    model = open_model(folder, num_threads=2)
    rows = dataset.held_out
    return score(model.predict_matrix(dataset.matrix[rows]), dataset.target[rows])


if __name__ == "__main__":
    main()
