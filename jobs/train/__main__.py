"""`python -m jobs.train model=lightgbm name=m training_set=t.parquet label=y`: fit, evaluate and register a version.

Each training is a run. `run=<id>` continues the run with this id from its last checkpoint, or prints the version that
the run has registered. Without `run`, the job makes an id and prints it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.artifact import model_key
from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.host.this_node import this_node
from cluster.ledger import Ledger, open_ledger
from cluster.placement import find_nodes
from cluster.registry import ModelVersion, Registry
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.run_files import RunFolder, run_folder
from cluster.security.encryption.scratch import memory_folder, scratch_directory
from cluster.security.keys.access import key_store
from cluster.session import attach, require_running_cluster
from cluster.storage import exists, layout, local, read_bytes, resolve, write_bytes
from jobs.metrics import headline
from jobs.train.config import TrainAction, TrainConfig
from jobs.train.data import TrainingSet, load_dataset, open_training_set
from jobs.train.describe import Prepared, prepare_and_describe, print_warnings
from jobs.train.families import FitContext, ResolvedFamily, resolve_family
from jobs.train.run.compare import comparison_plot, comparison_table, read_run
from jobs.train.run.evaluation import evaluate_held_out, requested_precision
from jobs.train.run.files import RunFiles, run_files
from jobs.train.run.identity import find_finished, new_run_id, run_settings
from jobs.train.run.lineage import build_lineage
from jobs.train.run.record import Run
from jobs.train.run.registration import TrainedModel, register, write_output
from jobs.train.split import resolve_split
from jobs.train.training_data import TrainingData, require_room


@job("train", TrainConfig, timed=True)
def main(config: TrainConfig) -> dict[str, Any] | None:
    """Train one version and register it, or compare two runs."""
    if config.action is TrainAction.compare:
        compare(config)
        return None
    family = resolve_family(model_with_best_parameters(config))
    if family.name == "lightgbm":
        refuse_unused(("deepspeed",), by="model=lightgbm")
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.train")
    model = Resource(kind="model", name=config.name, region=config.cluster.region)
    actor.check(Action.train_model, model)
    actor.check(Action.register_model, model)
    return run_training(config, family, ledger, actor)


def run_training(
    config: TrainConfig,
    family: ResolvedFamily,
    ledger: Ledger,
    actor: Actor,
    *,
    sweep: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Start or continue a run, and register its version. A finished run prints its version.

    Args:
        config: Configuration of the run.
        family: The resolved family.
        ledger: The ledger.
        actor: The caller, who may train and register the model.
        sweep: `run` and `trial` of the sweep that chose the hyper-parameters.

    Raises:
        ConfigError: The run was started with other settings or other data.
        TrainingFailed: The fit diverged, or the device has too little memory.
    """
    source = open_training_set(
        config.training_set, actor.access, places=layout(config.storage), ledger=ledger
    )
    run_id = config.run or new_run_id()
    config = replace(config, split=resolve_split(config.split, source), run=run_id)
    run = Run(
        ledger=ledger,
        model=config.name,
        run=run_id,
        family=family.name,
        settings=run_settings(config, family.name, family.parameters, source.hash),
        actor=actor.name,
    )
    is_continued = run.check_settings()
    number = run.finished_version()
    if number is not None:
        files_of_run(config, actor).remove_state()
        return describe_finished(config, ledger, number)
    prepared = prepare_and_describe(config, source, threshold=config.threshold)
    with run.recorded(is_continued=is_continued):
        version = train(config, family, source, prepared, ledger, actor, sweep=sweep or {})
    print(f"registered {version.name} version {version.version} {headline(config.task, version.metrics)}")
    return write_output(version, run=config.run, path=config.output)


def compare(config: TrainConfig) -> None:
    """Print two runs side by side, and write their plot to the configured file."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.train")
    root = layout(config.storage).root
    runs = [read_run(ledger, run, root=root, access=actor.access) for run in config.runs]
    print("\n".join(comparison_table(runs)))
    if config.output is not None:
        write_bytes(resolve(config.output), comparison_plot(runs).encode())


def train(
    config: TrainConfig,
    family: ResolvedFamily,
    source: TrainingSet,
    prepared: Prepared,
    ledger: Ledger,
    actor: Actor,
    *,
    sweep: Mapping[str, Any],
) -> ModelVersion:
    """Fit, evaluate and register a version. If another job has finished the run, return its version.

    The run is claimed until the version is registered. Otherwise another job could register a second one.
    """
    from jobs.train.progress import claimed_run  # imports Ray

    attach(config)
    places = layout(config.storage)
    key_store(actor.access).ensure(model_key(config.name))
    files = files_of_run(config, actor)
    # The model folder is in memory if there is room, because the model's files are not encrypted before the model is
    # registered.
    with (
        claimed_run(name_of_run(config, family)) as claim,
        run_folder(places, for_all_nodes=family.runs_anywhere and this_node() is not None) as ray_files,
        scratch_directory(memory_folder(otherwise=local(places.runs))) as folder,
    ):
        finished = find_finished(ledger, model=config.name, run=str(config.run))
        if finished is not None:
            files.remove_state()
            return Registry(ledger, places).get(config.name, finished.version)
        fit(config, family, prepared.data, folder=folder, files=files, ray_files=ray_files, claim=claim)
        lineage = build_lineage(config, source, family.parameters, sweep=sweep)
        result = evaluate_held_out(folder, prepared.data, requested_precision(family.parameters))
        print_warnings(result.warnings)
        trained = TrainedModel(
            name=config.name,
            family=family.name,
            task=config.task.value,
            folder=folder,
            lineage=lineage,
            metrics=result.metrics,
            warnings=[*prepared.warnings, *result.warnings],
        )
        version = register(trained, ledger, places, actor)
    files.remove_state()
    return version


def name_of_run(config: TrainConfig, family: ResolvedFamily) -> str:
    """Return the name under which a run is claimed. It is also the name of Ray Train's run."""
    return f"{config.name}-{family.name}-{config.run}"


def files_of_run(config: TrainConfig, actor: Actor) -> RunFiles:
    """Return the files of the run."""
    assert config.run is not None
    root = layout(config.storage).root
    return run_files(root, model=config.name, run=config.run, access=actor.access)


def describe_finished(config: TrainConfig, ledger: Ledger, number: int) -> dict[str, Any]:
    """Print and return the version that a finished run has registered."""
    version = Registry(ledger, layout(config.storage)).get(config.name, number)
    print(
        f"run {config.run} is finished: {version.name} version {version.version} "
        f"{headline(config.task, version.metrics)}"
    )
    return write_output(version, run=config.run, path=config.output)


def fit(
    config: TrainConfig,
    family: ResolvedFamily,
    data: TrainingData,
    *,
    folder: Path,
    files: RunFiles,
    ray_files: RunFolder,
    claim: Any,
) -> None:
    """Fit the model and write its files into `folder`.

    Args:
        config: Configuration of the run.
        family: Family of the model.
        data: The training set.
        folder: Folder for the model's files.
        files: Files of the run, for its checkpoints.
        ray_files: Folder for Ray Train's own files.
        claim: See `FitContext.claim`.
    """
    context = FitContext(
        folder=folder,
        runs=ray_files.path,
        file_system=ray_files.file_system,
        seed=config.seed,
        scaling=config.scaling,
        deepspeed=config.deepspeed,
        checkpoint=config.checkpoint,
        run_name=name_of_run(config, family),
        selector=find_nodes(config.placement, on_this_node=why_on_this_node(family, ray_files)),
        files=files,
        claim=claim,
    )
    if config.label_permutation:
        data = data.with_target(np.random.default_rng(config.seed).permutation(data.target))
    if family.is_network:
        from jobs.train.network.fit import fit_network  # imports torch and Ray Train

        fit_network(data, family, context)
    elif hasattr(family.module, "fit_rows"):
        family.module.fit_rows(data, family.parameters, context)
    else:
        require_room(data)
        family.module.fit(load_dataset(data.rows), family.parameters, context)


def why_on_this_node(family: ResolvedFamily, checkpoints: RunFolder) -> str | None:
    """Return why only this node can fit the family; None if other nodes can."""
    if not family.runs_anywhere:
        return "a family of your own may use this node's disk"
    if family.name != "lightgbm" and checkpoints.file_system is None:  # LightGBM's task returns its trees
        return "its checkpoints are on this node's disk"
    return None


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


if __name__ == "__main__":
    if any(argument.startswith("reproduce=") for argument in sys.argv[1:]):
        from jobs.train.reproduce import (
            main as reproduce,
        )  # it also imports the command that builds training sets

        reproduce()
    else:
        main()
