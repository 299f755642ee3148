"""`python -m jobs.sweep name=m training_set=t.parquet label=y`: look for a good learning rate and width.

A trial is a function that builds and fits a Ray Train trainer, because Tune no longer takes the trainer itself. Trials
and their workers hold CPUs separately, so as many trials run at once as leave room for the workers of each: a sweep
that started more would wait for ever. A trial without workers trains in its own process, because Ray Train starts seven
others for one worker, which takes ten times as long as a short trial's work.
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
from cluster.ledger import open_ledger
from cluster.ledger.events import SweepFinished
from cluster.security.acting import act
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.scratch import scratch
from cluster.session import attach, require_record
from cluster.storage import finite, layout, local, resolve, write_json
from jobs.sweep.config import SweepConfig
from jobs.sweep.trials import outcome, winner
from jobs.train.data import Dataset, read_training_set
from jobs.train.describe import prepare_aloud
from jobs.train.families import FitContext, resolve_family
from jobs.train.split import resolve_split
from jobs.train.tabular_network.family import Parameters, loop_config, network_shape, run, trainer
from jobs.train.tabular_network.loop import METRIC, fit_alone

TRIAL_CPUS = 0.5


@job("sweep", SweepConfig, timed=True)
def main(config: SweepConfig) -> None:
    """Run the sweep and write its best parameters."""
    family, _, parameters = resolve_family(config.model)
    if not isinstance(parameters, Parameters):
        raise ConfigError(f"A sweep tries the tabular network's parameters, not those of '{family}'.")
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="jobs.sweep")
    actor.check(Action.train_model, Resource(kind="model", name=config.name, region=config.cluster.region))
    places = layout(config.storage)
    source = read_training_set(
        config.training_set, protected_files(actor.access), places=places, ledger=ledger
    )
    config = replace(config, split=resolve_split(config.split, source))
    whole, _ = prepare_aloud(config, source)
    dataset = fewer_rows(whole, config.sweep.rows, seed=config.seed)
    attach(config)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    concurrent = concurrent_trials(config, available=resources.get("CPU", 0))
    print(
        f"{config.sweep.trials} trials, {concurrent} at once, each with {int(dataset.fit.sum())} rows to fit on "
        f"(sweep.epochs={config.sweep.epochs})",
        flush=True,
    )
    runs = local(f"{layout(config.storage).root}/runs")
    with scratch(runs) as folder:
        grid = search(config, dataset, parameters, folder=str(folder), concurrent=concurrent)
    trials = [outcome(grid[number], deadline_s=config.sweep.trial_deadline_s) for number in range(len(grid))]
    best = winner(trials)
    ended = [one for one in trials if one.cause is None]
    results = [finite(asdict(one)) for one in trials]
    # The ledger hears that a trial failed, but not why: the message of an unknown error may hold values of rows.
    events = [{name: value for name, value in one.items() if name != "cause"} for one in results]
    event = SweepFinished(
        model=config.name,
        family=family,
        trials=len(ended),
        metric=METRIC,
        best=best.chosen,
        results=events,
        training_set_hash=source.hash,
    )
    ledger.append(event, actor=actor.name)
    print(f"best of {len(ended)} trials: {best.chosen}, {METRIC} {best.validation_loss:.4f}")
    if config.output is not None:
        write_json(resolve(config.output), {"best": best.chosen, "metric": METRIC, "trials": results})


class Follow(tune.Callback):
    """Prints each trial as it ends."""

    def __init__(self, *, trials: int) -> None:
        self._done, self._trials = 0, trials

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune in the driver."""
        self._say(trial.config, f"{METRIC} {trial.last_result.get(METRIC, math.nan):.4f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune in the driver."""
        self._say(trial.config, "failed")

    def _say(self, config: dict[str, Any], what: str) -> None:
        self._done += 1
        chosen = f"learning_rate={config['learning_rate']:.3g} width={config['width']}"
        print(f"  trial {self._done} of {self._trials}: {chosen}: {what}", flush=True)


def search(
    config: SweepConfig, dataset: Dataset, parameters: Parameters, *, folder: str, concurrent: int
) -> tune.ResultGrid:
    """Run the trials."""
    # Tune's newer output prints its own tables and paths however little is asked for, and it logs the traceback of each
    # trial that fails; the sweep says what came of every trial itself.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    shared = ray.put(dataset)
    space = config.sweep
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": trial_cpus(config)}),
        param_space={
            "learning_rate": tune.loguniform(*space.learning_rate),
            "width": tune.choice(list(space.width)),
            "fixed": {
                "dataset": shared,
                "parameters": asdict(parameters) | {"epochs": space.epochs},
                "num_workers": space.num_workers,
                "context": FitContext(
                    folder=Path(folder),
                    runs=folder,
                    seed=config.seed,
                    scaling=config.scaling,
                    deepspeed=config.deepspeed,
                    run_name="",
                ),
            },
        },
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            num_samples=space.trials,
            time_budget_s=space.trial_deadline_s,
            reuse_actors=False,  # DeepSpeed cannot start twice in a process
            search_alg=tune.search.BasicVariantGenerator(random_state=config.seed, max_concurrent=concurrent),
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=folder,
            verbose=0,
            callbacks=[Follow(trials=space.trials)],
        ),
    )
    return tuner.fit()


def trial(settings: dict[str, Any]) -> None:
    """One trial: a short training run that reports to Tune."""
    fixed = settings["fixed"]
    chosen = {name: settings[name] for name in ("learning_rate", "width")}
    parameters = Parameters(**(fixed["parameters"] | chosen))
    dataset: Dataset = ray.get(fixed["dataset"])
    context: FitContext = replace(fixed["context"], run_name=f"trial-{tune.get_context().get_trial_id()}")
    shape = network_shape(dataset, parameters)
    if not fixed["num_workers"]:
        fit_alone(loop_config(dataset, parameters, shape, context), report=tune.report)
        return
    callbacks = [TuneReportCallback()]  # type: ignore[no-untyped-call]
    run(trainer(dataset, parameters, shape, context, num_workers=fixed["num_workers"], callbacks=callbacks))


def trial_cpus(config: SweepConfig) -> float:
    """Logical CPUs of a trial's own process."""
    return TRIAL_CPUS if config.sweep.num_workers else config.scaling.cpus_per_worker


def concurrent_trials(config: SweepConfig, *, available: float) -> int:
    """How many trials run at once: no more than fit beside the workers they wait for.

    Raises:
        ConfigError: not even one does.
    """
    needed = trial_cpus(config) + config.sweep.num_workers * config.scaling.cpus_per_worker
    if needed > available:
        raise ConfigError(
            f"A trial needs {needed:g} logical CPUs, the cluster has {available:g}. "
            "Lower sweep.num_workers or raise cluster.num_cpus."
        )
    return min(config.sweep.concurrent_trials, int(available // needed))


def fewer_rows(dataset: Dataset, rows: int, *, seed: int) -> Dataset:
    """The same dataset with at most so many rows to fit on."""
    places = np.flatnonzero(dataset.fit)
    if len(places) <= rows:
        return dataset
    fit = np.zeros_like(dataset.fit)
    fit[np.random.default_rng(seed).choice(places, rows, replace=False)] = True
    return replace(dataset, fit=fit)


if __name__ == "__main__":
    main()
