"""A sweep continues from its events: what the ledger keeps, and what is run again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError, TrainingFailed
from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent, SweepStarted, TrialFinished, TrialReported, TrialStarted
from jobs.sweep.__main__ import require_best, sweep_settings
from jobs.sweep.config import SearchConfig, SweepConfig
from jobs.sweep.history import Status, Trial, best_trial, fold, read_trials
from jobs.sweep.record import SweepRecord
from jobs.train.families import resolve_family

OWNER: dict[str, str] = {"model": "m", "run": "s"}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    yield ledger
    ledger.close()


def settings(data: str = "h", **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"name": "m", "training_set": "t", "label": "y"}
    return sweep_settings(SweepConfig(**options | changes), resolve_family({"family": "lightgbm"}), data)


def record(ledger: Ledger, **changes: Any) -> SweepRecord:
    return SweepRecord(ledger=ledger, family="lightgbm", settings=settings(**changes), actor="me", **OWNER)


def test_a_new_record_has_the_trials_of_the_ledger(ledger: Ledger) -> None:
    """Ended trials keep losses and status. The others have not ended, and keep their parameters."""
    first = record(ledger)
    assert not first.start()
    one = first.trial_started(1, {"a": 1})
    first.trial_reported(one, 1, 0.5)
    first.trial_reported(one, 2, 0.4)
    first.trial_ended(one, Status.finished)
    first.trial_ended(first.trial_started(2, {"a": 2}), Status.failed, reason="OSError", cause="secret")
    first.trial_reported(first.trial_started(3, {"a": 3}), 1, 0.3)
    second = record(ledger)
    assert second.start()
    assert second.trials == {
        1: Trial(number=1, parameters={"a": 1}, status=Status.finished, losses={1: 0.5, 2: 0.4}),
        2: Trial(number=2, parameters={"a": 2}, status=Status.failed, reason="OSError"),
        3: Trial(number=3, parameters={"a": 3}, losses={1: 0.3}),
    }
    third = second.trial_started(3, {"a": 3})
    assert third.losses == {}
    assert third.starts == 2
    assert read_trials(ledger, **OWNER)[3] == third


def test_workers_that_start_again_replace_the_losses_of_the_earlier_ones(ledger: Ledger) -> None:
    """They begin at rung 1. Losses of two fits are never mixed."""
    sweep = record(ledger)
    trial = sweep.trial_started(1, {"a": 1})
    for rung, loss in ((1, 0.5), (2, 0.1), (3, 0.2), (1, 0.6), (2, math.nan)):
        sweep.trial_reported(trial, rung, loss)
    assert trial.losses == read_trials(ledger, **OWNER)[1].losses == {1: 0.6}
    sweep.trial_reported(trial, 3, 0.4)
    assert trial.losses == read_trials(ledger, **OWNER)[1].losses == {1: 0.6, 3: 0.4}


def test_a_finished_sweep_is_finished_once(ledger: Ledger) -> None:
    """The best is the trial with the smallest loss. A second event is not appended."""
    sweep = record(ledger)
    sweep.start()
    for number, loss in enumerate((0.5, 0.2, 0.3), start=1):
        trial = sweep.trial_started(number, {"a": number})
        sweep.trial_reported(trial, 1, loss)
        sweep.trial_ended(trial, Status.stopped if number == 3 else Status.finished)
    assert sweep.finished() is None
    event = sweep.finish(training_set_hash="h")
    assert (event.best_trial, event.best, event.trials) == (2, {"a": 2}, 3)
    sweep.finish(training_set_hash="h")
    assert sweep.finished() == event
    assert len(list(ledger.entries(type(event)))) == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_trial_without_a_finite_loss_has_failed(ledger: Ledger, loss: float) -> None:
    """It never wins, and the ledger has no such number."""
    sweep = record(ledger)
    trial = sweep.trial_started(1, {"a": 1})
    sweep.trial_reported(trial, 1, loss)
    sweep.trial_ended(trial, Status.finished)
    assert trial.status is Status.failed
    assert read_trials(ledger, **OWNER)[1].loss is None
    assert best_trial([trial]) is None


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"data": "other"}, "data.hash"),
        ({"seed": 1}, "seed"),
        ({"sweep": SearchConfig(trials=4)}, "sweep.trials"),
        ({"sweep": SearchConfig(space={"a": {"choices": [1]}})}, "sweep.space.a.choices"),
        ({"validation_share": 0.2}, "validation_share"),
    ],
)
def test_other_settings_or_data_are_refused(ledger: Ledger, changes: dict[str, Any], name: str) -> None:
    """The message names the setting."""
    record(ledger).start()
    with pytest.raises(ConfigError, match=f"Sweep 's' of model 'm' was started with {name}="):
        record(ledger, **changes).start()


def test_budget_and_concurrency_may_change(ledger: Ledger) -> None:
    """They do not determine the parameters of a trial."""
    record(ledger).start()
    assert record(ledger, sweep=SearchConfig(concurrent_trials=7, trial_deadline_s=9)).start()
    assert len(list(ledger.entries(SweepStarted))) == 1


def test_a_sweep_without_a_winner_prints_the_cause_of_each_trial(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per trial. After a restart, only the type of the error is known."""
    trials = [
        Trial(number=1, parameters={"a": 0.5}, status=Status.failed, reason="OSError", cause="disk full"),
        Trial(number=2, parameters={"a": 0.25}, status=Status.failed, reason="OSError"),
    ]
    with pytest.raises(TrainingFailed, match="None of 2 trials"):
        require_best(trials)
    assert capsys.readouterr().err.splitlines() == [
        "trial 1: a=0.5: failed: disk full",
        "trial 2: a=0.25: failed: OSError",
    ]


events = st.one_of(
    st.builds(
        TrialStarted,
        model=st.just("m"),
        run=st.just("s"),
        trial=st.integers(1, 3),
        parameters=st.just({"a": 1}),
    ),
    st.builds(
        TrialReported,
        model=st.just("m"),
        run=st.just("s"),
        trial=st.integers(1, 3),
        rung=st.integers(1, 3),
        loss=st.none() | st.floats(0, 1),
    ),
    st.builds(
        TrialFinished,
        model=st.just("m"),
        run=st.just("s"),
        trial=st.integers(1, 3),
        status=st.sampled_from(["finished", "stopped", "failed"]),
        loss=st.none(),
    ),
)


@given(st.lists(events, max_size=30))
def test_an_ended_trial_never_changes(stream: list[LedgerEvent]) -> None:
    """Whatever events follow, for example those of a second job with the same id."""
    ended: dict[int, Trial] = {}
    for end in range(len(stream) + 1):
        trials = fold(stream[:end])
        for number, trial in ended.items():
            assert trials[number] == trial
        ended = {number: trial for number, trial in trials.items() if trial.has_ended}
