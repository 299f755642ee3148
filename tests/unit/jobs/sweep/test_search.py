"""Which trials a sweep runs, and which it stops, before and after it was killed. Tune's classes are real."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from jobs.sweep.config import Scheduler, Search, SearchConfig
from jobs.sweep.history import Status, Trial
from jobs.sweep.search import Asha, LedgerSearch
from jobs.sweep.space import Choices, Range, Space

SPACE: Space = {
    "rate": Range(low=0.001, high=0.1, is_log=True, is_whole=False),
    "width": Choices(values=(8, 16)),
    "depth": Range(low=1, high=4, is_log=False, is_whole=True),
}


def ended(number: int, loss: float, status: Status = Status.finished) -> Trial:
    parameters = {"rate": 0.01, "width": 8, "depth": 2}
    return Trial(number=number, parameters=parameters, status=status, losses={1: loss})


def suggestions(
    search: Search, trials: dict[int, Trial] | None = None, *, num: int = 5
) -> list[dict[str, Any]]:
    """Return the configurations of all trials that are still to be run. Their losses are their rates."""
    config = SearchConfig(trials=num, search=search)
    chosen = LedgerSearch(SPACE, trials or {}, config, seed=3)
    found: list[dict[str, Any]] = []
    while (suggestion := chosen.suggest(f"t{len(found)}")) != Searcher.FINISHED:
        loss = {"validation_loss": suggestion["parameters"]["rate"], "rung": 1}
        chosen.on_trial_result(f"t{len(found)}", loss)
        chosen.on_trial_complete(f"t{len(found)}", loss)
        found.append(suggestion)
    return found


@pytest.mark.parametrize("search", list(Search))
def test_ended_trials_are_not_run_again(search: Search) -> None:
    """An interrupted trial comes first, with its parameters, and then the trials with new numbers."""
    waiting = Trial(number=2, parameters={"rate": 0.05, "width": 16, "depth": 4})
    trials = {1: ended(1, 0.4), 2: waiting, 3: ended(3, 0.5, Status.failed)}
    found = suggestions(search, trials)
    assert [one["number"] for one in found] == [2, 4, 5]
    assert found[0]["parameters"] == waiting.parameters
    for one in found:
        assert one["parameters"].keys() == SPACE.keys()
        assert 0.001 <= one["parameters"]["rate"] <= 0.1


@pytest.mark.parametrize("search", list(Search))
def test_a_trial_without_a_recorded_start_is_run(search: Search) -> None:
    """Two trials start at once. The sweep is killed when only the second start is in the ledger."""
    trials = {2: ended(2, 0.4), 4: Trial(number=4, parameters={"rate": 0.05, "width": 16, "depth": 4})}
    assert [one["number"] for one in suggestions(search, trials)] == [4, 1, 3, 5]
    config = SearchConfig(trials=5, search=search)
    assert LedgerSearch(SPACE, trials, config, seed=3).num_waiting == 4


def test_a_random_search_that_continues_equals_an_unbroken_one() -> None:
    """The parameters depend on the number of the trial only."""
    whole = suggestions(Search.random)
    trials = {one["number"]: Trial(**one, status=Status.finished, losses={1: 1.0}) for one in whole[:2]}
    assert suggestions(Search.random, trials) == whole[2:]


def test_optuna_does_not_repeat_its_first_trials() -> None:
    """Its random generator also depends on the number of ended trials."""
    whole = suggestions(Search.optuna)
    trials = {one["number"]: Trial(**one, status=Status.finished, losses={1: 1.0}) for one in whole[:2]}
    rates = [one["parameters"]["rate"] for one in (*whole[:2], *suggestions(Search.optuna, trials))]
    assert len(set(rates)) == 5


def test_optuna_learns_from_the_trials_of_the_ledger() -> None:
    """After trials of which the low rates were good, it suggests lower rates than a random search."""
    trials = {
        number: Trial(
            number=number,
            parameters={"rate": 0.1 * 0.87**number, "width": 8, "depth": 2},
            status=Status.finished,
            losses={1: 0.1 * 0.87**number},
        )
        for number in range(1, 31)
    }

    def mean_rate(search: Search) -> float:
        found = suggestions(search, trials, num=50)
        return sum(one["parameters"]["rate"] for one in found) / len(found)

    assert mean_rate(Search.optuna) < 0.5 * mean_rate(Search.random)


def mean_rate_after_stopped_trials(search: Search) -> float:
    """Return the mean of the rates that are suggested. ASHA stops each trial at its first report, a loss of its rate.

    Tune then calls `on_trial_complete` alone.
    """
    chosen = LedgerSearch(SPACE, {}, SearchConfig(trials=40, search=search), seed=3, stopped=ANY_TRIAL)
    rates: list[float] = []
    while (suggestion := chosen.suggest(f"t{len(rates)}")) != Searcher.FINISHED:
        rate = suggestion["parameters"]["rate"]
        chosen.on_trial_complete(f"t{len(rates)}", {"validation_loss": rate, "rung": 1})
        rates.append(rate)
    return sum(rates[20:]) / 20


class _AnyTrial(frozenset[str]):
    def __contains__(self, trial_id: object) -> bool:
        return True


ANY_TRIAL = _AnyTrial()


def test_optuna_learns_from_stopped_trials() -> None:
    """Also from those that are stopped at their first report."""
    optuna, random = (mean_rate_after_stopped_trials(search) for search in (Search.optuna, Search.random))
    assert optuna < 0.5 * random


def test_stopped_trials_are_pruned_for_optuna() -> None:
    """The number of reports counts first, then the last loss, for trials of the ledger and for those of this job."""
    stopped = replace(ended(1, 0.9, Status.stopped), losses={1: 0.9, 2: 0.7})
    trials = {1: stopped, 2: ended(2, 0.4)}
    chosen = LedgerSearch(
        SPACE, trials, SearchConfig(trials=3, search=Search.optuna), seed=3, stopped=ANY_TRIAL
    )
    chosen.suggest("t")
    for rung, loss in ((1, 0.8), (2, 0.6)):
        chosen.on_trial_result("t", {"validation_loss": loss, "rung": rung})
    chosen.on_trial_complete("t", {"validation_loss": 0.65, "rung": 3})
    assert chosen._optuna is not None
    known = chosen._optuna._ot_study.trials
    assert [(one.state.name, one.value) for one in known] == [
        ("PRUNED", 0.7),
        ("COMPLETE", 0.4),
        ("PRUNED", 0.65),
    ]
    assert [one.intermediate_values for one in known] == [{0: 0.9, 1: 0.7}, {}, {0: 0.8, 1: 0.6, 2: 0.65}]


def tune_trial(name: str) -> Any:
    return SimpleNamespace(trial_id=name)


def test_asha_stops_a_trial_that_is_worse_than_those_of_the_ledger() -> None:
    """Its rungs are filled from the reports of ended trials. Failed trials do not count."""
    config = SearchConfig(scheduler=Scheduler.asha, reduction=2)
    trials = [ended(1, 0.2), ended(2, 0.3), ended(3, 0.1, Status.failed)]

    def actions(known: list[Trial], loss: float) -> str:
        scheduler = Asha(known, config, num_reports=8)
        controller: Any = None
        scheduler.on_trial_add(controller, tune_trial("new"))
        result = {"rung": 1, "validation_loss": loss}
        action = scheduler.on_trial_result(controller, tune_trial("new"), result)
        assert (action == TrialScheduler.STOP) == ("new" in scheduler.stopped)
        return action

    assert actions(trials, 0.9) == TrialScheduler.STOP
    assert actions(trials, 0.15) == TrialScheduler.CONTINUE
    assert actions([], 0.9) == TrialScheduler.CONTINUE
