"""Choose the parameters of trials, and stop bad trials early. Both continue from the trials that the ledger has.

Tune's own pickles are not used: they lie in a scratch folder, and a newer release of Ray may not read them.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Set
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from jobs.sweep.config import Search, SearchConfig
from jobs.sweep.history import Status, Trial, with_report
from jobs.sweep.space import Space, draw
from jobs.train.progress import METRIC, RUNG

MODE = "min"
_STEP = "training_iteration"
"""Ray's key for the step of a report to Optuna."""
NUMBER, PARAMETERS = "number", "parameters"
"""Keys of a trial's configuration."""


class LedgerSearch(Searcher):
    """Suggests first the trials that were interrupted, with the same parameters, and then new trials.

    Args:
        space: The search space.
        trials: Trials of the sweep so far, by number.
        config: Configuration of the search.
        seed: Seed of the sweep.
        stopped: Tune's ids of the trials that the scheduler has stopped. It adds them while the sweep runs.
    """

    def __init__(
        self,
        space: Space,
        trials: Mapping[int, Trial],
        config: SearchConfig,
        *,
        seed: int,
        stopped: Set[str] = frozenset(),
    ) -> None:
        super().__init__(metric=METRIC, mode=MODE)
        self._space, self._seed, self._stopped = space, seed, stopped
        self._waiting = deque(trial for trial in trials.values() if not trial.has_ended)
        # After a kill, a trial may be recorded whose predecessor is not.
        self._new = deque(number for number in range(1, config.trials + 1) if number not in trials)
        self._losses: dict[str, dict[int, float]] = {}
        self._interrupted: dict[str, dict[str, Any]] = {}
        self._optuna = None
        if config.search is Search.optuna:
            self._optuna = optuna_search(space, trials.values(), seed=seed)

    @property
    def num_waiting(self) -> int:
        """Number of trials that are still to be run."""
        return len(self._waiting) + len(self._new)

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of the next trial."""
        if self._waiting:
            trial = self._waiting.popleft()
            self._interrupted[trial_id] = trial.parameters
            return {NUMBER: trial.number, PARAMETERS: trial.parameters}
        if not self._new:
            return Searcher.FINISHED
        number = self._new.popleft()
        if self._optuna is None:
            return {NUMBER: number, PARAMETERS: draw(self._space, seed=self._seed, trial=number)}
        return {NUMBER: number, PARAMETERS: self._optuna.suggest(trial_id)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep a loss of the trial."""
        loss = result[METRIC] if math.isfinite(result[METRIC]) else None
        self._losses[trial_id] = with_report(self._losses.get(trial_id, {}), result[RUNG], loss)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna the result. Tune does not call `on_trial_result` for the report that stops a trial."""
        if self._optuna is None:
            return
        if result and METRIC in result:
            self.on_trial_result(trial_id, result)
        losses = {} if error else self._losses.get(trial_id, {})
        is_stopped = trial_id in self._stopped
        if trial_id not in self._interrupted:
            tell(self._optuna, trial_id, losses, is_stopped=is_stopped)
        elif losses:  # Optuna did not suggest it
            add_ended(self._optuna, self._interrupted[trial_id], losses, is_stopped=is_stopped)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the ledger has the trials."""
        with open(checkpoint_path, "wb"):
            pass

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing."""

    def __reduce__(self) -> Any:
        return (object, ())  # Tune pickles it, and nothing reads that


def optuna_search(space: Space, trials: Iterable[Trial], *, seed: int) -> Any:
    """Return Optuna's search, which knows the trials that have ended.

    Its random generator is seeded by their number, too. Otherwise a sweep that continues would try the first parameters
    again.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(logging.WARNING)
    ended = [trial for trial in trials if trial.has_ended]
    search = OptunaSearch(
        space={name: domain.distribution() for name, domain in space.items()},
        metric=METRIC,
        mode=MODE,
        seed=int(np.random.default_rng([seed, len(ended)]).integers(2**31)),
    )
    for trial in ended:
        if trial.loss is None:
            search.add_evaluated_point(trial.parameters, math.nan, error=True)
        else:
            add_ended(search, trial.parameters, trial.losses, is_stopped=trial.status is Status.stopped)
    return search


def add_ended(
    optuna: Any, parameters: dict[str, Any], losses: Mapping[int, float], *, is_stopped: bool
) -> None:
    """Add an ended trial that Optuna did not suggest. For the value of a stopped trial see `tell`."""
    by_rung = [losses[rung] for rung in sorted(losses)]
    if is_stopped:
        optuna.add_evaluated_point(parameters, by_rung[-1], pruned=True, intermediate_values=by_rung)
    else:
        optuna.add_evaluated_point(parameters, min(by_rung))


def tell(optuna: Any, trial_id: str, losses: Mapping[int, float], *, is_stopped: bool) -> None:
    """Tell Optuna the end of a trial that it suggested.

    A stopped trial is a pruned one for Optuna. Its value is its last loss, and Optuna compares it with other pruned
    trials by the number of reports first. A trial without a loss has failed.
    """
    if not losses:
        optuna.on_trial_complete(trial_id, error=True)
    elif not is_stopped:
        optuna.on_trial_complete(trial_id, {METRIC: min(losses.values())})
    else:
        for step, rung in enumerate(sorted(losses)):  # `add_evaluated_point` counts the steps in the same way
            optuna.on_trial_result(trial_id, {METRIC: losses[rung], _STEP: step})
        optuna.on_trial_complete(trial_id)


class Asha(ASHAScheduler):
    """ASHA that knows which trials it has stopped, and starts from the reports of ended trials.

    Args:
        trials: Trials of the sweep so far.
        config: Configuration of the search.
        num_reports: Number of reports of a whole trial.
    """

    def __init__(self, trials: Iterable[Trial], config: SearchConfig, *, num_reports: int) -> None:
        super().__init__(
            time_attr=RUNG,
            metric=METRIC,
            mode=MODE,
            max_t=max(num_reports, config.grace) + 1,  # a trial ends by itself
            grace_period=config.grace,
            reduction_factor=config.reduction,
        )
        self.stopped: set[str] = set()
        """Tune's ids of the trials that were stopped."""
        for trial in trials:
            if trial.has_ended and trial.status is not Status.failed:
                self._replay(trial)

    def _replay(self, trial: Trial) -> None:
        stands_for: Any = SimpleNamespace(trial_id=f"ended-{trial.number}")
        controller: Any = None
        self.on_trial_add(controller, stands_for)
        for rung, loss in sorted(trial.losses.items()):
            super().on_trial_result(controller, stands_for, {RUNG: rung, METRIC: loss})
        self.on_trial_remove(controller, stands_for)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Return whether the trial goes on."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return action

    def __reduce__(self) -> Any:
        return (object, ())  # Tune pickles it, and nothing reads that


class NoScheduler(FIFOScheduler):
    """Stops no trial."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stopped: frozenset[str] = frozenset()
