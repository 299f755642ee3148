"""`python -m jobs.sweep name=m training_set=t.parquet label=y model=lightgbm`: search for good hyper-parameters.

Each sweep has an id. `run=<id>` continues the sweep with this id: trials that have ended are not run again. A finished
sweep prints its best trial.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import TrainingFailed
from cluster.host.this_node import this_node
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import SweepFinished
from cluster.scheduling import background_cpus, priority_warning
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.run_files import run_folder
from cluster.session import attach, require_running_cluster
from cluster.storage import layout, resolve, write_bytes, write_json
from jobs.sweep.config import BEST_SUFFIX, SweepConfig
from jobs.sweep.display import describe
from jobs.sweep.history import Trial, best_trial
from jobs.sweep.record import SweepRecord
from jobs.sweep.space import parse_space
from jobs.train.config import LearningConfig, TrainConfig
from jobs.train.data import TrainingSet, open_training_set
from jobs.train.describe import prepare_and_describe, print_warnings
from jobs.train.families import ResolvedFamily, resolve_family
from jobs.train.progress import METRIC, claimed_run
from jobs.train.rows.encoded import Part
from jobs.train.run.identity import new_run_id, run_settings
from jobs.train.split import resolve_split
from jobs.train.training_data import TrainingData

if TYPE_CHECKING:
    from jobs.sweep.tuning import Sweep  # imports Ray Tune

FREE_SETTINGS = frozenset({"concurrent_trials", "trial_deadline_s"})
"""Settings of the search that may differ when a sweep continues."""


@job("sweep", SweepConfig, timed=True)
def main(config: SweepConfig) -> dict[str, Any]:
    """Run or continue a sweep, and write the best parameters. With `register=true`, train and register the best."""
    family = resolve_family(config.model | config.sweep.model)
    if not family.is_network:
        refuse_unused(("deepspeed",), by=f"model={family.name}")
    space = parse_space(config.sweep.space, config.model | config.sweep.model, family)
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.sweep")
    model = Resource(kind="model", name=config.name, region=config.cluster.region)
    actor.check(Action.train_model, model)
    if config.register:
        actor.check(Action.register_model, model)
    source = open_training_set(
        config.training_set, actor.access, places=layout(config.storage), ledger=ledger
    )
    run = config.run or new_run_id()
    config = replace(config, split=resolve_split(config.split, source), run=run)
    record = SweepRecord(
        ledger=ledger,
        model=config.name,
        run=run,
        family=family.name,
        settings=sweep_settings(config, family, source.hash),
        actor=actor.name,
    )
    is_continued = record.start()
    event = record.finished()
    if event is None:
        print(f"sweep {run} {'continues' if is_continued else 'starts'}", flush=True)
        event = search(config, family, space, source, record)
    else:
        print(f"sweep {run} is finished", flush=True)
    best = record.trials[event.best_trial or 0]
    print(f"best of {event.trials} trials: trial {best.number}, {describe(best)}", flush=True)
    output = write_results(config, event, list(record.trials.values()), record.settings)
    if config.register:
        output["registered"] = register_best(config, best, ledger, actor)
        if config.output is not None:
            write_json(resolve(config.output), output)
    return output


def search(
    config: SweepConfig, family: ResolvedFamily, space: Any, source: TrainingSet, record: SweepRecord
) -> SweepFinished:
    """Run the trials that have not ended, and record the result. If another job has finished the sweep, return its
    result.

    Raises:
        TrainingFailed: No trial has a loss. Standard error has the cause of each.
    """
    from jobs.sweep.tuning import Sweep  # imports Ray Tune

    prepared = prepare_and_describe(config, source)
    data = limit_fit_rows(prepared.data, config.sweep.rows, seed=config.seed)
    attach(config, is_background=True)
    with claimed_run(f"sweep-{config.name}-{config.run}"):
        record.start()  # reads the trials again: another job may have run some, or all
        event = record.finished()
        if event is not None:
            return event
        run_open_trials(Sweep(config=config, family=family, space=space, data=data), record)
        require_best(list(record.trials.values()))
        return record.finish(training_set_hash=source.hash)


def run_open_trials(sweep: Sweep, record: SweepRecord) -> None:
    """Run the trials that have not ended, as many at once as there are CPUs for.

    Raises:
        ConfigError: There are too few CPUs for one trial.
        TrainingFailed: The process of a trial was lost, or the time budget was too short for it.
    """
    import ray

    from jobs.sweep.tuning import concurrent_trials, run_trials, stays_here  # imports Ray Tune

    config = sweep.config
    with run_folder(layout(config.storage), for_all_nodes=this_node() is not None) as runs:
        is_here = stays_here(sweep, runs)
        cpus = background_cpus(ray.get_runtime_context().get_node_id() if is_here else None)
        warning = priority_warning() if cpus.serving else None
        print_warnings([warning] if warning else [])
        concurrent = concurrent_trials(
            sweep, available=cpus.free, where="this node" if is_here else "the cluster"
        )
        ended = sum(trial.has_ended for trial in record.trials.values())
        print(
            f"{config.sweep.trials} trials, {f'{ended} have ended, ' if ended else ''}{concurrent} at once, each "
            f"with {int(sweep.data.fit.sum())} rows to fit on",
            flush=True,
        )
        run_trials(sweep, record, runs=runs, concurrent=concurrent)


def sweep_settings(config: SweepConfig, family: ResolvedFamily, data_hash: str) -> dict[str, Any]:
    """Return everything that determines the trials, by dotted name."""
    section = {name: value for name, value in asdict(config.sweep).items() if name not in FREE_SETTINGS}
    return run_settings(config, family.name, family.parameters, data_hash, sweep=section)


def require_best(trials: Sequence[Trial]) -> None:
    """Require that a trial has a loss. If not, print the cause of each trial to standard error.

    Raises:
        TrainingFailed: None has.
    """
    if best_trial(trials) is not None:
        return
    for trial in trials:
        print(f"trial {trial.number}: {describe(trial)}", file=sys.stderr, flush=True)
    raise TrainingFailed(
        f"None of {len(trials)} trials has a finite {METRIC}, so the sweep has no best trial. "
        "Standard error has the cause of each."
    )


def write_results(
    config: SweepConfig, event: SweepFinished, trials: Sequence[Trial], settings: Any
) -> dict[str, Any]:
    """Return the result of the sweep, and write the configured files."""
    output = {
        "run": config.run,
        "best": event.best,
        "best_trial": event.best_trial,
        "metric": event.metric,
        "trials": [trial.as_result() | {"cause": trial.cause} for trial in trials],
    }
    if config.output is not None:
        write_json(resolve(config.output), output)
    if config.report is not None:
        from jobs.sweep.page import render

        page = render(trials, model=config.name, run=str(config.run), settings=dict(settings))
        write_bytes(resolve(config.report), page.encode())
    return output


def register_best(config: SweepConfig, best: Trial, ledger: Ledger, actor: Actor) -> dict[str, Any]:
    """Train the best trial in full and register it. A second call prints the version."""
    from jobs.train.__main__ import run_training

    shared = {field.name: getattr(config, field.name) for field in fields(LearningConfig)}
    model = config.model | best.parameters
    training = TrainConfig(**(shared | {"model": model, "run": f"{config.run}{BEST_SUFFIX}"}))
    sweep = {"run": config.run, "trial": best.number}
    return run_training(training, resolve_family(model), ledger, actor, sweep=sweep)


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
