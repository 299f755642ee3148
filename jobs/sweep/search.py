"""Choose the parameters of trials, and stop bad trials early. Both continue from the trials that the ledger has.

Tune's own pickles are not used: they lie in a scratch folder, and a newer release of Ray may not read them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from jobs.sweep.config import Search, SearchConfig
from jobs.sweep.history import Status, Trial
from jobs.sweep.space import Space, draw
from jobs.train.progress import METRIC

MODE = "min"
RUNG = "training_iteration"
"""Tune's name for the number of a report."""
NUMBER, PARAMETERS = "number", "parameters"
"""Keys of a trial's configuration."""


class LedgerSearch(Searcher):
    """Suggests first the trials that were interrupted, with the same parameters, and then new trials.

    Args:
        space: The search space.
        trials: Trials of the sweep so far, by number.
        config: Configuration of the search.
        seed: Seed of the sweep.
    """

    def __init__(self, space: Space, trials: Mapping[int, Trial], config: SearchConfig, *, seed: int) -> None:
        super().__init__(metric=METRIC, mode=MODE)
        self._space, self._seed = space, seed
        self._waiting = deque(trial for trial in trials.values() if not trial.has_ended)
        # After a kill, a trial may be recorded whose predecessor is not.
        self._new = deque(number for number in range(1, config.trials + 1) if number not in trials)
        self._best: dict[str, float] = {}
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
        """Keep the smallest loss of the trial."""
        self._best[trial_id] = min(result[METRIC], self._best.get(trial_id, result[METRIC]))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna the result."""
        loss = self._best.get(trial_id)
        if self._optuna is None:
            return
        if trial_id in self._interrupted:  # Optuna did not suggest it
            if loss is not None and not error:
                self._optuna.add_evaluated_point(self._interrupted[trial_id], loss)
            return
        self._optuna.on_trial_complete(
            trial_id, None if loss is None or error else {METRIC: loss}, error=error
        )

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
        loss = trial.loss
        search.add_evaluated_point(
            trial.parameters, float("nan") if loss is None else loss, error=loss is None
        )
    return search


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
