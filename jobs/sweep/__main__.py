"""`python -m jobs.sweep name=m training_set=t.parquet label=y`: search for a good learning rate and width.

A trial is a function that builds and runs a Ray Train trainer, because Tune no longer accepts the trainer itself.
Trials and their workers reserve CPUs separately. Only as many trials run at the same time as leave CPUs for the workers
of each; otherwise trials would wait for workers that never start.

A trial without workers trains in its own process. Ray Train starts seven other processes for one worker, which takes
ten times as long as a short trial.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.host.this_node import this_node
from cluster.ledger import open_ledger
from cluster.ledger.events import SweepFinished
from cluster.placement import find_nodes, here
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.run_files import RunFolder, run_folder
from cluster.session import attach, require_running_cluster
from cluster.storage import layout, replace_non_finite, resolve, write_json
from jobs.sweep.config import SweepConfig
from jobs.sweep.results import Trial, best_trial, trial_from_result
from jobs.train.data import open_training_set
from jobs.train.describe import prepare_and_describe
from jobs.train.families import FitContext, ResolvedFamily, resolve_family
from jobs.train.network.fit import build_trainer, prepare_fit, run_trainer
from jobs.train.network.loop import METRIC
from jobs.train.network.worker import fit_alone
from jobs.train.rows.encoded import Part
from jobs.train.split import resolve_split
from jobs.train.tabular_network.family import Parameters
from jobs.train.training_data import TrainingData

TRIAL_CPUS = 0.5
"""Logical CPUs that a trial's own process reserves while its workers train."""


@job("sweep", SweepConfig, timed=True)
def main(config: SweepConfig) -> dict[str, Any]:
    """Run the sweep, append its result to the ledger and write the best parameters."""
    family = resolve_family(config.model)
    if not isinstance(family.parameters, Parameters):
        raise ConfigError(
            f"A sweep needs model=tabular_network, got family '{family.name}': it only searches the parameters of the "
            "tabular network."
        )
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.sweep")
    actor.check(Action.train_model, Resource(kind="model", name=config.name, region=config.cluster.region))
    source = open_training_set(
        config.training_set, actor.access, places=layout(config.storage), ledger=ledger
    )
    config = replace(config, split=resolve_split(config.split, source))
    prepared = prepare_and_describe(config, source)
    data = limit_fit_rows(prepared.data, config.sweep.rows, seed=config.seed)
    attach(config)
    trials = run_trials(config, data, family)
    best = best_trial(trials)
    finished = [trial for trial in trials if trial.cause is None]
    results = [replace_non_finite(asdict(trial)) for trial in trials]
    # The ledger does not get the cause of a failure, because an error message may contain values of rows.
    events = [{name: value for name, value in result.items() if name != "cause"} for result in results]
    event = SweepFinished(
        model=config.name,
        family=family.name,
        trials=len(finished),
        metric=METRIC,
        best=best.parameters,
        results=events,
        training_set_hash=source.hash,
    )
    ledger.append(event, actor=actor.name)
    print(f"best of {len(finished)} trials: {best.parameters}, {METRIC} {best.validation_loss:.4f}")
    output = {"best": best.parameters, "metric": METRIC, "trials": results}
    if config.output is not None:
        write_json(resolve(config.output), output)
    return output


def run_trials(config: SweepConfig, data: TrainingData, family: ResolvedFamily) -> list[Trial]:
    """Run all trials and return their results."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    concurrent = concurrent_trials(config, available=resources.get("CPU", 0))
    print(
        f"{config.sweep.trials} trials, {concurrent} at once, each with {int(data.fit.sum())} rows to fit on "
        f"(sweep.epochs={config.sweep.epochs})",
        flush=True,
    )
    # By default Tune prints its own tables and paths, and logs the traceback of each failed trial. The sweep prints one
    # line per trial instead.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with run_folder(layout(config.storage), for_all_nodes=this_node() is not None) as runs:
        grid = build_tuner(config, data, family, runs=runs, concurrent=concurrent).fit()
    deadline_s = config.sweep.trial_deadline_s
    return [trial_from_result(grid[number], deadline_s=deadline_s) for number in range(len(grid))]


def build_tuner(
    config: SweepConfig, data: TrainingData, family: ResolvedFamily, *, runs: RunFolder, concurrent: int
) -> tune.Tuner:
    """Return the tuner of a sweep with `concurrent` parallel trials. `runs` is for temporary files."""
    sweep = config.sweep
    # Tune knows no labels, so the trials of a region run on this node.
    is_here = runs.file_system is None or config.placement.region is not None
    context = FitContext(
        folder=Path(),
        runs=runs.path,
        file_system=runs.file_system,
        seed=config.seed,
        scaling=config.scaling,
        deepspeed=config.deepspeed,
        run_name="",
        selector=find_nodes(config.placement, on_this_node="Ray Tune knows no regions" if is_here else None),
    )
    return tune.Tuner(
        tune.with_resources(run_trial, {"CPU": trial_cpus(config), **(here() if is_here else {})}),
        param_space={
            "learning_rate": tune.loguniform(*sweep.learning_rate),
            "width": tune.choice(list(sweep.width)),
            "fixed": {
                "data": ray.put(data),
                "model": config.model | {"epochs": sweep.epochs},
                "num_workers": sweep.num_workers,
                "context": context,
            },
        },
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            num_samples=sweep.trials,
            time_budget_s=sweep.trial_deadline_s,
            reuse_actors=False,  # DeepSpeed cannot start twice in a process
            search_alg=tune.search.BasicVariantGenerator(random_state=config.seed, max_concurrent=concurrent),
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=runs.path,
            storage_filesystem=runs.file_system,
            verbose=0,
            callbacks=[TrialPrinter(num_trials=sweep.trials)],
        ),
    )


class TrialPrinter(tune.Callback):
    """Tune callback that prints one line when a trial ends."""

    def __init__(self, *, num_trials: int) -> None:
        self._num_ended, self._num_trials = 0, num_trials

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print the loss of a completed trial. Tune calls this in the driver."""
        self._print_trial(trial.config, f"{METRIC} {trial.last_result.get(METRIC, math.nan):.4f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that a trial failed. Tune calls this in the driver."""
        self._print_trial(trial.config, "failed")

    def _print_trial(self, config: dict[str, Any], result: str) -> None:
        self._num_ended += 1
        parameters = f"learning_rate={config['learning_rate']:.3g} width={config['width']}"
        print(f"  trial {self._num_ended} of {self._num_trials}: {parameters}: {result}", flush=True)


def run_trial(settings: dict[str, Any]) -> None:
    """Run one trial: fit a network for a few epochs, and report its metrics to Tune."""
    fixed = settings["fixed"]
    searched = {name: settings[name] for name in ("learning_rate", "width")}
    family = resolve_family(fixed["model"] | searched)
    data: TrainingData = ray.get(fixed["data"])
    context: FitContext = replace(fixed["context"], run_name=f"trial-{tune.get_context().get_trial_id()}")
    network_fit = prepare_fit(data, family, context, num_workers=fixed["num_workers"])
    if not fixed["num_workers"]:
        fit_alone(network_fit.loop_config(), report=tune.report)
        return
    callbacks = [TuneReportCallback()]  # type: ignore[no-untyped-call]
    run_trainer(build_trainer(network_fit, num_workers=fixed["num_workers"], callbacks=callbacks))


def trial_cpus(config: SweepConfig) -> float:
    """Return the logical CPUs of a trial's own process."""
    return TRIAL_CPUS if config.sweep.num_workers else config.scaling.cpus_per_worker


def concurrent_trials(config: SweepConfig, *, available: float) -> int:
    """Return how many trials may run at the same time, so that each has CPUs for its workers.

    Args:
        config: Configuration of the sweep.
        available: Logical CPUs of the cluster.

    Raises:
        ConfigError: The cluster has too few CPUs for one trial.
    """
    needed = trial_cpus(config) + config.sweep.num_workers * config.scaling.cpus_per_worker
    if needed > available:
        raise ConfigError(
            f"A trial needs {needed:g} logical CPUs, but the cluster has {available:g}. "
            "Lower sweep.num_workers or raise cluster.num_cpus."
        )
    return min(config.sweep.concurrent_trials, int(available // needed))


def limit_fit_rows(data: TrainingData, max_rows: int, *, seed: int) -> TrainingData:
    """Return the data with at most `max_rows` rows to fit on. The seed decides which rows."""
    positions = np.flatnonzero(data.fit)
    if len(positions) <= max_rows:
        return data
    parts = data.parts.copy()
    parts[positions] = Part.unused
    parts[np.random.default_rng(seed).choice(positions, max_rows, replace=False)] = Part.fit
    return data.with_parts(parts)


if __name__ == "__main__":
    main()
