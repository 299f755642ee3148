"""`python -m jobs.train model=lightgbm name=m training_set=t.parquet label=y`: fit, evaluate and register a version."""

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
from cluster.host.this_node import this_node
from cluster.ledger import Ledger, open_ledger
from cluster.placement import find_nodes
from cluster.registry import Lineage, ModelVersion, Registry
from cluster.runtime import ModelSignature, Precision, Predictions, open_model
from cluster.runtime.device_choice import Hardware
from cluster.runtime.predictions import check_scores
from cluster.runtime.signature import SIGNATURE_FILE
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.run_files import RunFolder, run_folder
from cluster.security.encryption.scratch import memory_folder, scratch_directory
from cluster.security.keys.access import key_store
from cluster.session import attach, require_running_cluster
from cluster.storage import exists, json_text, layout, local, read_bytes, resolve, write_json
from jobs.metrics import headline, score
from jobs.train.config import TrainConfig
from jobs.train.data import Dataset, read_training_set
from jobs.train.describe import prepare_and_describe, print_warnings
from jobs.train.families import FitContext, ResolvedFamily, resolve_family
from jobs.train.lineage import build_lineage, to_json_values
from jobs.train.split import resolve_split


@job("train", TrainConfig, timed=True)
def main(config: TrainConfig) -> dict[str, Any]:
    """Train one version and register it."""
    family = resolve_family(model_with_best_parameters(config))
    if family.name == "lightgbm":
        refuse_unused(("deepspeed",), by="model=lightgbm")
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.train")
    model = Resource(kind="model", name=config.name, region=config.cluster.region)
    actor.check(Action.train_model, model)
    actor.check(Action.register_model, model)
    source = read_training_set(
        config.training_set, protected_files(actor.access), places=layout(config.storage), ledger=ledger
    )
    config = replace(config, split=resolve_split(config.split, source))
    dataset, data_warnings = prepare_and_describe(config, source, threshold=config.threshold)
    attach(config)
    places = layout(config.storage)
    # The model folder is in memory if there is room, because the model's files are not encrypted before the model is
    # registered.
    with (
        run_folder(places, for_all_nodes=family.runs_anywhere and this_node() is not None) as checkpoints,
        scratch_directory(memory_folder(otherwise=local(places.runs))) as folder,
    ):
        fit(config, family, dataset, folder=folder, checkpoints=checkpoints)
        lineage = build_lineage(config, source, family.parameters)
        result = evaluate_held_out(folder, dataset, requested_precision(family.parameters))
        print_warnings(result.warnings)
        write_model_files(folder, lineage, result.metrics)
        warnings = [*data_warnings, *result.warnings]
        trained = TrainedModel(family.name, folder, lineage, result.metrics, warnings)
        version = register(config, trained, ledger, actor)
    print(f"registered {version.name} version {version.version} {headline(config.task, result.metrics)}")
    output = {
        "name": version.name,
        "version": version.version,
        "family": family.name,
        "metrics": result.metrics,
        "warnings": warnings,
    }
    if config.output is not None:
        write_json(resolve(config.output), output)
    return output


def fit(
    config: TrainConfig, family: ResolvedFamily, dataset: Dataset, *, folder: Path, checkpoints: RunFolder
) -> None:
    """Fit the model and write its files into `folder`."""
    context = FitContext(
        folder=folder,
        runs=checkpoints.path,
        file_system=checkpoints.file_system,
        seed=config.seed,
        scaling=config.scaling,
        deepspeed=config.deepspeed,
        run_name=f"{config.name}-{family.name}-{int(time.time())}",
        selector=find_nodes(config.placement, on_this_node=why_on_this_node(family, checkpoints)),
    )
    fitted = permute_labels(dataset, seed=config.seed) if config.label_permutation else dataset
    family.module.fit(fitted, family.parameters, context)


def why_on_this_node(family: ResolvedFamily, checkpoints: RunFolder) -> str | None:
    """Return why only this node can fit the family; None if other nodes can."""
    if not family.runs_anywhere:
        return "a family of your own may use this node's disk"
    if family.name != "lightgbm" and checkpoints.file_system is None:  # LightGBM writes no checkpoints
        return "its checkpoints are on this node's disk"
    return None


class TrainedModel(NamedTuple):
    """A fitted and evaluated model, ready to be registered."""

    family: str
    folder: Path
    """Folder with the model's files."""
    lineage: Lineage
    metrics: dict[str, Any]
    warnings: list[str]


def register(config: TrainConfig, trained: TrainedModel, ledger: Ledger, actor: Actor) -> ModelVersion:
    """Register a trained model as the next version of `config.name`."""
    return Registry(ledger, layout(config.storage)).register(
        trained.folder,
        name=config.name,
        family=trained.family,
        task=config.task.value,
        lineage=trained.lineage,
        metrics=trained.metrics,
        warnings=trained.warnings,
        store=key_store(actor.access),
        actor=actor.name,
    )


def write_model_files(folder: Path, lineage: Lineage, metrics: dict[str, Any]) -> None:
    """Write the training configuration and the metrics into the model folder."""
    (folder / "config.json").write_text(json_text(to_json_values(lineage.config)))
    (folder / "metrics.json").write_text(json_text(metrics))


def model_with_best_parameters(config: TrainConfig) -> dict[str, Any]:
    """Return the configured hyper-parameters. If `params_from` is set, the best values of the sweep replace them.

    Raises:
        ConfigError: The sweep's file is missing or has no best parameters.
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
        raise ConfigError(f"params_from={uri} has no 'best' parameters; it must be the output of a sweep.")
    return config.model | best


def permute_labels(dataset: Dataset, *, seed: int) -> Dataset:
    """Return the same rows with shuffled labels."""
    return replace(dataset, target=np.random.default_rng(seed).permutation(dataset.target))


class HeldOutResult(NamedTuple):
    """Metrics and warnings of a model on the held-out rows."""

    metrics: dict[str, Any]
    warnings: list[str]


def evaluate_held_out(folder: Path, dataset: Dataset, precision: Precision) -> HeldOutResult:
    """Write the model's signature into the model folder, and evaluate the model on the held-out rows.

    With the precision int8, the model is quantised and the int8 model is evaluated. The metrics then also have
    `quantised_from`: the metrics of the float32 model, and how far the scores of both models differ.

    Raises:
        ConfigError: The model cannot be quantised to int8.
    """
    float32 = predict_held_out(folder, dataset, dataset.signature)
    target = dataset.target[dataset.held_out]
    metrics = score(float32, target)
    is_constant = len(float32.scores) > 1 and bool((float32.scores == float32.scores[0]).all())
    warnings = ["the model gives all held-out rows the same score: it learned nothing"] if is_constant else []
    if precision is Precision.float32:
        return HeldOutResult(metrics, warnings)
    from jobs.train.quantise import quantisation_cost, quantise  # imports ONNX and ONNX Runtime

    quantise(folder)
    int8 = predict_held_out(folder, dataset, replace(dataset.signature, precision=precision))
    cost = quantisation_cost(float32, int8, metrics)
    return HeldOutResult(score(int8, target) | {"quantised_from": cost}, warnings)


def predict_held_out(folder: Path, dataset: Dataset, signature: ModelSignature) -> Predictions:
    """Write the signature into the model folder, load the model and predict the held-out rows.

    Raises:
        RefusedError: The files are no valid model, or the scores do not fit the task.
    """
    (folder / SIGNATURE_FILE).write_text(signature.to_json())
    model = open_model(folder, hardware=Hardware(num_threads=2))
    predictions = model.predict_matrix(dataset.matrix[dataset.held_out])
    check_scores(predictions)
    return predictions


def requested_precision(parameters: Any) -> Precision:
    """Return the precision to register the model with. It is float32 for a family without the parameter `precision`.

    Raises:
        ConfigError: A user's own family declares `precision` with another type.
    """
    precision = getattr(parameters, "precision", Precision.float32)
    if not isinstance(precision, Precision):
        raise ConfigError(f"model.precision must be a cluster.runtime.Precision, got {precision!r}.")
    return precision


if __name__ == "__main__":
    import sys

    if any(argument.startswith("reproduce=") for argument in sys.argv[1:]):
        from jobs.train.reproduce import (
            main as reproduce,
        )  # it also imports the command that builds training sets

        reproduce()
    else:
        main()
