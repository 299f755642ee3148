"""Run the trials of a sweep with Ray Tune, and record each trial in the ledger.

Trials and their workers reserve CPUs separately. Only as many trials run at the same time as leave CPUs for the workers
of each; otherwise trials would wait for workers that never start.

A trial without workers trains in its own process. Ray Train starts seven other processes for one worker, which takes
ten times as long as a short trial.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.tune import TuneError

from cluster.errors import ConfigError, RefusedError, TrainingFailed, first_line, refusal_behind
from cluster.placement import find_nodes, here
from cluster.security.encryption.run_files import RunFolder
from cluster.storage import layout, local
from jobs.sweep.config import Scheduler, SweepConfig
from jobs.sweep.display import Display
from jobs.sweep.history import MAX_STARTS, Status, Trial
from jobs.sweep.record import SweepRecord
from jobs.sweep.search import NUMBER, PARAMETERS, Asha, LedgerSearch, NoScheduler
from jobs.sweep.space import Space
from jobs.sweep.trial import FIXED, TrialSettings, run_trial
from jobs.train.families import FitContext, ResolvedFamily
from jobs.train.memory import was_killed_by_ray
from jobs.train.progress import METRIC, RUNG
from jobs.train.training_data import TrainingData
from jobs.train.trial import num_reports, trial_cpus
from jobs.train.trial_error import TrialFailed


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The inputs of a sweep."""

    config: SweepConfig
    family: ResolvedFamily
    """The family, with the hyper-parameters of the trials that are not searched."""
    space: Space
    data: TrainingData

    @property
    def model(self) -> dict[str, Any]:
        """Family and hyper-parameters of the trials that are not searched."""
        return self.config.model | self.config.sweep.model

    @property
    def trial_cpus(self) -> float:
        """Logical CPUs of a trial's own process."""
        return trial_cpus(
            self.family,
            num_workers=self.config.sweep.num_workers,
            cpus_per_worker=self.config.scaling.cpus_per_worker,
        )


def run_trials(sweep: Sweep, record: SweepRecord, *, runs: RunFolder, concurrent: int) -> None:
    """Run all trials that have not ended. The record then has all trials.

    Args:
        sweep: The sweep.
        record: Its record in the ledger.
        runs: Folder for Ray's own files.
        concurrent: Number of trials that run at the same time.

    Raises:
        TrainingFailed: The process of a trial was lost, or the time budget was too short for it. The same run
            continues the sweep.
    """
    # By default Tune prints its own tables and paths, and logs the traceback of each failed trial. The sweep prints one
    # line per trial instead.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interrupted sweep is not finished
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    config = sweep.config.sweep
    scheduler: Asha | NoScheduler = NoScheduler()
    if config.scheduler is Scheduler.asha:
        scheduler = Asha(record.trials.values(), config, num_reports=num_reports(sweep.family))
    search = LedgerSearch(
        sweep.space, record.trials, config, seed=sweep.config.seed, stopped=scheduler.stopped
    )
    if not search.num_waiting:
        return
    with Display(num_trials=config.trials) as display:
        recorder = Recorder(record, scheduler, display)
        tuner = build_tuner(sweep, search, scheduler, recorder, runs=runs, concurrent=concurrent)
        try:
            tuner.fit()
        except RuntimeError as error:  # Tune does not expect it, and ends
            if not was_killed_by_ray(error):
                raise
            recorder.lose_unended()
        else:
            recorder.end_interrupted(deadline_s=config.trial_deadline_s)
    record.flush()
    if recorder.lost:
        lost = ", ".join(map(str, sorted(recorder.lost)))
        raise TrainingFailed(
            f"The processes of these trials were lost, perhaps because memory was short: {lost}. "
            f"`run={record.run}` continues the sweep; sweep.concurrent_trials=1 needs less memory."
        )
    if recorder.late:
        late = ", ".join(map(str, sorted(recorder.late)))
        raise TrainingFailed(
            f"The time budget of sweep.trial_deadline_s={config.trial_deadline_s:g} ended before these trials had a "
            f"report: {late}. Raise it; `run={record.run}` continues the sweep."
        )


def build_tuner(
    sweep: Sweep,
    search: LedgerSearch,
    scheduler: Asha | NoScheduler,
    recorder: Recorder,
    *,
    runs: RunFolder,
    concurrent: int,
) -> tune.Tuner:
    """Return the tuner of a sweep with `concurrent` parallel trials. `runs` is for temporary files."""
    config = sweep.config
    is_here = stays_here(sweep, runs)
    settings = TrialSettings(
        data=ray.put(sweep.data),
        model=sweep.model,
        num_workers=config.sweep.num_workers,
        context=FitContext(
            folder=Path(),
            runs=runs.path,
            file_system=runs.file_system,
            seed=config.seed,
            scaling=config.scaling,
            deepspeed=config.deepspeed,
            run_name="",
            selector=find_nodes(
                config.placement, on_this_node="Ray Tune knows no regions" if is_here else None
            ),
        ),
        scratch=str(local(layout(config.storage).runs)),
    )
    resources = {"CPU": sweep.trial_cpus, **(here() if is_here else {})}
    return tune.Tuner(
        tune.with_resources(run_trial, resources),
        param_space={FIXED: settings},
        tune_config=tune.TuneConfig(
            num_samples=search.num_waiting,
            max_concurrent_trials=concurrent,
            time_budget_s=config.sweep.trial_deadline_s,
            reuse_actors=False,  # DeepSpeed cannot start twice in a process, and a trial's process has a low priority
            search_alg=search,
            # By default, the names have all values of the configuration.
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
            scheduler=scheduler,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=runs.path,
            storage_filesystem=runs.file_system,
            verbose=0,
            callbacks=[recorder],
        ),
    )


def stays_here(sweep: Sweep, runs: RunFolder) -> bool:
    """Return whether all trials run on this node.

    Tune knows no labels, so the trials of a region do. So do those of a family that uses this node's disk.
    """
    is_in_a_region = sweep.config.placement.region is not None
    return runs.file_system is None or is_in_a_region or not sweep.family.runs_anywhere


def trial_name(trial: Any) -> str:
    """Return the name of a trial and of its folder."""
    return f"trial-{trial.config[NUMBER]}-{trial.trial_id}"


def concurrent_trials(sweep: Sweep, *, available: float, where: str) -> int:
    """Return how many trials may run at the same time, so that each has CPUs for its workers.

    Args:
        sweep: The sweep.
        available: Logical CPUs that serving does not need, where the trials may run.
        where: Where that is, for the message.

    Raises:
        ConfigError: They are too few for one trial.
    """
    config = sweep.config
    workers = config.sweep.num_workers if sweep.family.is_network else 0
    needed = sweep.trial_cpus + workers * config.scaling.cpus_per_worker
    if needed > available:
        raise ConfigError(
            f"A trial needs {needed:g} logical CPUs, but {where} has {available:g} beside serving. Lower "
            "sweep.num_workers, or raise cluster.num_cpus."
        )
    return min(config.sweep.concurrent_trials, int(available / needed))


class Recorder(tune.Callback):
    """Tune callback that records and shows each trial. Tune calls it in the driver."""

    def __init__(self, record: SweepRecord, scheduler: Asha | NoScheduler, display: Display) -> None:
        self._record, self._scheduler, self._display = record, scheduler, display
        self._started: set[int] = set()
        self.lost: set[int] = set()
        """Numbers of the trials whose process was lost. They are run again."""
        self.late: set[int] = set()
        """Numbers of the trials that had no report, or did not start, in the time budget. They are run again."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the start."""
        self._started.add(trial.config[NUMBER])
        self._display.show(self._record.trial_started(trial.config[NUMBER], trial.config[PARAMETERS]))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a loss."""
        known = self._trial(trial)
        self._record.trial_reported(known, result[RUNG], result[METRIC])
        self._display.show(known)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the end of a trial that did not fail."""
        is_stopped = trial.trial_id in self._scheduler.stopped
        self._end(self._trial(trial), Status.stopped if is_stopped else Status.finished)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial failed. A trial whose process was lost has not ended, and is run again."""
        if trial.config[NUMBER] not in self._started:  # its process was lost before Tune knew of the start
            self.on_trial_start(iteration, trials, trial)
        known, error = self._trial(trial), read_error(trial)
        if is_lost(error) and known.starts < MAX_STARTS:
            self.lost.add(known.number)
            return
        self._end(known, Status.failed, reason=error_type(error), cause=error_line(error))

    def lose_unended(self) -> None:
        """Count the started trials without an end as lost: Ray killed one for memory, and all ended with Tune."""
        for number in sorted(self._started):
            trial = self._record.trials[number]
            if trial.has_ended:
                continue
            self.lost.add(number)
            if trial.starts >= MAX_STARTS:
                cause = "its process was lost too often, perhaps because memory was short"
                self._end(trial, Status.failed, reason=OutOfMemoryError.__name__, cause=cause)

    def end_interrupted(self, *, deadline_s: float) -> None:
        """End the trials that the time budget has stopped. One without a loss is run again, as if it were lost."""
        for trial in self._record.trials.values():
            if trial.has_ended or trial.number in self.lost:
                continue
            if trial.number in self._started and (trial.losses or trial.starts >= MAX_STARTS):
                cause = f"ended before its first report (sweep.trial_deadline_s is {deadline_s:g})"
                self._end(trial, Status.stopped, reason="TimeBudget", cause=cause)
            else:
                self.late.add(trial.number)

    def _trial(self, trial: Any) -> Trial:
        return self._record.trials[trial.config[NUMBER]]

    def _end(self, trial: Trial, status: Status, *, reason: str = "", cause: str | None = None) -> None:
        self._record.trial_ended(trial, status, reason=reason, cause=cause)
        self._display.show(trial)

    def __reduce__(self) -> Any:
        return (object, ())  # Tune pickles it, and nothing reads that


def read_error(trial: Any) -> BaseException:
    """Return the error of a failed trial. Tune has just written it into the trial's folder on this machine."""
    path = Path(trial.pickled_error_file)
    if trial.run_metadata.pickled_error_filename is None or not path.is_file():
        return TuneError("its error is unknown")
    error: BaseException = cloudpickle.loads(path.read_bytes())
    return error


def error_type(error: BaseException) -> str:
    """Return the type of a trial's error, without Ray's wrapper and our own."""
    original = refusal_behind(error)
    if isinstance(original, TrialFailed):
        return original.reason
    return type(getattr(original, "cause", None) or original).__name__


def error_line(error: BaseException) -> str:
    """Return a trial's error in one line, without values of rows.

    These are the messages of Falaj's own errors, and of Ray's about its processes. Of another error it is the type.
    """
    original = refusal_behind(error)
    is_safe = isinstance(original, RefusedError | TrainingFailed | TuneError) or is_lost(original)
    return first_line(original) if is_safe else error_type(error)


def is_lost(error: BaseException) -> bool:
    """Return whether the process of a trial was lost. An error of its code has another type."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
