"""`python -m jobs.train model=lightgbm name=m training_set=t.parquet label=y`: fit, score, register."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import open_ledger
from cluster.registry import Lineage, Registry
from cluster.runtime import ModelSignature, Precision, Predictions, open_model
from cluster.runtime.hardware import Hardware
from cluster.runtime.predictions import check_scores
from cluster.runtime.signature import SIGNATURE_FILE
from cluster.security.acting import act
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.scratch import memory_folder, scratch
from cluster.security.keys.access import key_store
from cluster.session import attach, require_record
from cluster.storage import exists, json_text, layout, local, read_bytes, resolve, write_json
from jobs.metrics import headline, score
from jobs.train.config import TrainConfig
from jobs.train.data import Dataset, read_training_set
from jobs.train.describe import prepare_aloud, say
from jobs.train.families import FitContext, resolve_family
from jobs.train.lineage import lineage, plain
from jobs.train.quantise import cost, quantise
from jobs.train.split import resolve_split


@job("train", TrainConfig, timed=True)
def main(config: TrainConfig) -> None:
    """Train one version and register it."""
    family, module, parameters = resolve_family(with_best(config))
    if family == "lightgbm":
        refuse_unused(("deepspeed",), by="model=lightgbm")
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="jobs.train")
    model = Resource(kind="model", name=config.name, region=config.cluster.region)
    actor.check(Action.train_model, model)
    actor.check(Action.register_model, model)
    places, files = layout(config.storage), protected_files(actor.access)
    source = read_training_set(config.training_set, files, places=places, ledger=ledger)
    config = replace(config, split=resolve_split(config.split, source))
    dataset, warnings = prepare_aloud(config, source, threshold=config.threshold)
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
        judgement = judged(folder, dataset, precision_of(parameters))
        say(judgement.warnings)
        metrics, warnings = judgement.metrics, [*warnings, *judgement.warnings]
        describe_model(folder, origin, metrics)
        version = Registry(ledger, places).register(
            folder,
            name=config.name,
            family=family,
            task=config.task.value,
            lineage=origin,
            metrics=metrics,
            warnings=warnings,
            store=key_store(actor.access),
            actor=actor.name,
        )
    print(f"registered {version.name} version {version.version} {headline(config.task, metrics)}")
    if config.output is not None:
        result = {"name": version.name, "version": version.version, "family": family, "metrics": metrics}
        write_json(resolve(config.output), result | {"warnings": warnings})


def describe_model(folder: Path, origin: Lineage, metrics: dict[str, Any]) -> None:
    """Put the configuration and the metrics beside a model's files."""
    (folder / "config.json").write_text(json_text(plain(origin.config)))
    (folder / "metrics.json").write_text(json_text(metrics))


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


class Judgement(NamedTuple):
    """What is found of a model on the held-out rows."""

    metrics: dict[str, Any]
    warnings: list[str]


def judged(folder: Path, dataset: Dataset, precision: Precision) -> Judgement:
    """Say in the folder what model it holds, and judge just that on the held-out rows.

    An int8 model's say under `quantised_from` what the float32 one's were, and how far the scores lie apart.

    Raises:
        ConfigError: int8 of a model that cannot be.
    """
    before = held_out(folder, dataset, dataset.signature)
    target = dataset.target[dataset.held_out]
    metrics = score(before, target)
    same = len(before.scores) > 1 and bool((before.scores == before.scores[0]).all())
    warnings = ["the model gives all held-out rows the same score: it learned nothing"] if same else []
    if precision is Precision.float32:
        return Judgement(metrics, warnings)
    quantise(folder)
    after = held_out(folder, dataset, replace(dataset.signature, precision=precision))
    return Judgement(score(after, target) | {"quantised_from": cost(before, after, metrics)}, warnings)


def held_out(folder: Path, dataset: Dataset, signature: ModelSignature) -> Predictions:
    """What a folder's model says of rows it has never seen; from then on the folder has the signature.

    Raises:
        RefusedError: the files make no model, or its scores are not what the task says.
    """
    (folder / SIGNATURE_FILE).write_text(signature.to_json())
    model = open_model(folder, hardware=Hardware(num_threads=2))
    predictions = model.predict_matrix(dataset.matrix[dataset.held_out])
    check_scores(predictions)
    return predictions


def precision_of(parameters: Any) -> Precision:
    """What a version is registered as, where its family has the choice.

    Raises:
        ConfigError: a user's own family declares it as something else.
    """
    chosen = getattr(parameters, "precision", Precision.float32)
    if not isinstance(chosen, Precision):
        raise ConfigError(f"model.precision must be a cluster.runtime.Precision, got {chosen!r}.")
    return chosen


if __name__ == "__main__":
    main()
