"""`python -m jobs.sweep name=m training_set=t.parquet label=y`: look for a good learning rate and width.

A trial is a function that builds and fits a Ray Train trainer, because Tune no longer takes the trainer itself. Trials
and their workers hold CPUs separately, so as many trials run at once as leave room for the workers of each: a sweep
that started more would wait for ever.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from cluster.entrypoint import job
from cluster.errors import ConfigError, FalajError
from cluster.ledger import open_ledger
from cluster.ledger.events import SweepFinished
from cluster.security.identity import current_actor
from cluster.session import attach
from cluster.storage import layout, local, resolve, write_bytes
from jobs.sweep.config import SweepConfig
from jobs.train.data import Dataset, prepare, read_training_set
from jobs.train.families import FitContext, resolve_family
from jobs.train.tabular_network.family import Parameters, network_shape, trainer

METRIC = "validation_loss"
TRIAL_CPUS = 0.5


class SweepFailed(FalajError):
    """No trial came to its end."""


@job("sweep", SweepConfig)
def main(config: SweepConfig) -> None:
    """Run the sweep and write its best parameters."""
    family, _, parameters = resolve_family(config.model)
    if not isinstance(parameters, Parameters):
        raise ConfigError(f"A sweep tries the tabular network's parameters, not those of '{family}'.")
    source = read_training_set(config.training_set)
    dataset = fewer_rows(prepare(config, source), config.sweep.rows, seed=config.seed)
    attach(config)
    runs = local(f"{layout(config.storage).root}/runs")
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as folder:
        grid = search(config, dataset, parameters, folder)
    ended = [one for one in (grid[number] for number in range(len(grid))) if one.error is None]
    results = [
        {
            "learning_rate": one.config["learning_rate"],
            "width": one.config["width"],
            METRIC: one.metrics[METRIC],
        }
        for one in ended
        if one.config and one.metrics and METRIC in one.metrics
    ]
    if not results:
        raise SweepFailed(f"None of {config.sweep.trials} trials came to its end: {grid.errors[:1]}")
    best = min(results, key=lambda one: float(one[METRIC]))
    chosen = {name: best[name] for name in ("learning_rate", "width")}
    event = SweepFinished(
        model=config.name,
        family=family,
        trials=len(results),
        metric=METRIC,
        best=chosen,
        results=results,
        training_set_hash=source.hash,
    )
    open_ledger(config).append(event, actor=current_actor())
    print(f"best of {len(results)} trials: {chosen}, {METRIC} {best[METRIC]:.4f}")
    if config.output is not None:
        content = {"best": chosen, "metric": METRIC, "trials": results}
        write_bytes(resolve(config.output), json.dumps(content, indent=1).encode())


def search(config: SweepConfig, dataset: Dataset, parameters: Parameters, folder: str) -> tune.ResultGrid:
    """Run the trials."""
    shared = ray.put(dataset)
    space = config.sweep
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": TRIAL_CPUS}),
        param_space={
            "learning_rate": tune.loguniform(*space.learning_rate),
            "width": tune.choice(list(space.width)),
            "fixed": {
                "dataset": shared,
                "parameters": asdict(parameters) | {"epochs": space.epochs},
                "context": FitContext(
                    folder=Path(folder),
                    runs=folder,
                    seed=config.seed,
                    scaling=replace(config.scaling, num_workers=space.num_workers),
                    deepspeed=config.deepspeed,
                    run_name="",
                ),
            },
        },
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            num_samples=space.trials,
            max_concurrent_trials=concurrent_trials(config),
            time_budget_s=space.trial_deadline_s,
            search_alg=tune.search.BasicVariantGenerator(
                random_state=config.seed, max_concurrent=concurrent_trials(config)
            ),
        ),
        run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0),
    )
    return tuner.fit()


def trial(settings: dict[str, Any]) -> None:
    """One trial: a short training run that reports to Tune."""
    fixed = settings["fixed"]
    chosen = {name: settings[name] for name in ("learning_rate", "width")}
    parameters = Parameters(**(fixed["parameters"] | chosen))
    dataset: Dataset = ray.get(fixed["dataset"])
    context: FitContext = replace(fixed["context"], run_name=f"trial-{tune.get_context().get_trial_id()}")
    run = trainer(
        dataset,
        parameters,
        network_shape(dataset, parameters),
        context,
        callbacks=[TuneReportCallback()],  # type: ignore[no-untyped-call]
    )
    run.fit()


def concurrent_trials(config: SweepConfig) -> int:
    """How many trials fit beside the workers they wait for; at least one.

    Raises:
        ConfigError: not even one does.
    """
    workers = config.sweep.num_workers * config.scaling.cpus_per_worker
    fit = int(config.cluster.num_cpus // (workers + TRIAL_CPUS))
    if fit < 1:
        raise ConfigError(
            f"A trial needs {workers + TRIAL_CPUS:g} logical CPUs, the cluster has {config.cluster.num_cpus}. "
            "Lower sweep.num_workers or raise cluster.num_cpus."
        )
    # Two trials at once on a small machine take as long as one after the other, and twice the memory.
    return min(fit, max(1, config.cluster.num_cpus // 16))


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
