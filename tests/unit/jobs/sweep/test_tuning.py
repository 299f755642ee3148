"""How the ends of trials are recorded, and how many trials run at the same time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from ray import cloudpickle
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from rich.console import Console

from cluster.errors import ConfigError, TrainingFailed
from cluster.ledger import Ledger
from jobs.sweep import tuning
from jobs.sweep.config import SearchConfig, SweepConfig
from jobs.sweep.display import Display
from jobs.sweep.history import MAX_STARTS, Status, Trial, read_trials
from jobs.sweep.record import SweepRecord
from jobs.sweep.search import NUMBER, PARAMETERS, NoScheduler
from jobs.sweep.tuning import Recorder, Sweep, concurrent_trials, run_trials, stays_here
from jobs.train.families import resolve_family
from jobs.train.trial_error import TrialFailed
from tests.samples import plain_fit

OWNER: dict[str, str] = {"model": "m", "run": "s"}
OUT_OF_MEMORY = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")
REPORT = {"rung": 1, "validation_loss": 0.5}


@pytest.fixture
def record(tmp_path: Path) -> Iterator[SweepRecord]:
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    yield SweepRecord(ledger=ledger, family="lightgbm", settings={}, actor="me", **OWNER)
    ledger.close()


def recorder(record: SweepRecord) -> Recorder:
    display = Display(num_trials=3, console=Console(file=io.StringIO()))
    return Recorder(record, NoScheduler(), display)


def tune_trial(folder: Path, number: int, error: Exception | None = None) -> Any:
    """Return what the callback uses of Tune's trial, with its error in its folder."""
    path = folder / f"error-{number}"
    if error is not None:
        path.write_bytes(cloudpickle.dumps(error))
    return SimpleNamespace(
        trial_id=f"t{number}",
        config={NUMBER: number, PARAMETERS: {"a": number}},
        pickled_error_file=str(path),
        run_metadata=SimpleNamespace(pickled_error_filename=path.name if error else None),
    )


def in_worker(error: Exception) -> Exception:
    wrapped: Exception = RayTaskError(
        "f", f"Traceback …\n{type(error).__name__}: {error}", error
    ).as_instanceof_cause()
    return wrapped


@pytest.mark.parametrize(
    ("error", "reason", "cause"),
    [
        (in_worker(TrainingFailed("The loss is nan.\nmore")), "TrainingFailed", "The loss is nan."),
        (in_worker(ValueError("bob is 42")), "ValueError", "ValueError"),
        (
            in_worker(TrialFailed("KeyError", "fit, own.py line 3")),
            "KeyError",
            "KeyError in fit, own.py line 3. Its",
        ),
        (None, "TuneError", "its error is unknown"),
    ],
)
def test_values_of_rows_in_an_error_are_neither_recorded_nor_shown(
    record: SweepRecord,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: Exception | None,
    reason: str,
    cause: str,
) -> None:
    """The message of an error of a family's code may have some. The ledger has only the type of any error."""
    callback, trial = recorder(record), tune_trial(tmp_path, 1, error)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_error(0, [], trial)
    known = record.trials[1]
    assert (known.status, known.reason) == (Status.failed, reason)
    assert known.cause is not None
    assert known.cause.startswith(cause)
    assert read_trials(record.ledger, **OWNER)[1].reason == reason
    assert "bob" not in "".join(str(entry.payload) for entry in record.ledger.entries()) + known.cause
    assert "bob" not in capsys.readouterr().out


def test_a_trial_does_not_fail_because_its_end_could_not_be_recorded(
    record: SweepRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events wait, in their order, until the ledger answers. Tune takes any error of a callback for the trial's."""
    callback, trial = recorder(record), tune_trial(tmp_path, 1)
    callback.on_trial_start(0, [], trial)
    with monkeypatch.context() as down:
        down.setattr(Ledger, "append", ledger_is_down)
        callback.on_trial_result(0, [], trial, REPORT)
        callback.on_trial_complete(0, [], trial)
        with pytest.raises(TrainingFailed, match=r"The ledger does not answer.*`run=s` continues the sweep"):
            record.flush(timeout_s=0)
    assert not read_trials(record.ledger, **OWNER)[1].has_ended
    record.flush(timeout_s=0)
    ended = read_trials(record.ledger, **OWNER)[1]
    assert (ended.status, ended.losses) == (Status.finished, {1: 0.5})


def ledger_is_down(*_: Any, **__: Any) -> None:
    raise sa.exc.OperationalError("INSERT", {}, Exception("server closed the connection"))


def test_an_ended_trial_ends_once(record: SweepRecord, tmp_path: Path) -> None:
    """A later error of Tune does not change how it ended."""
    callback, trial = recorder(record), tune_trial(tmp_path, 1)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, REPORT)
    callback.on_trial_complete(0, [], trial)
    callback.on_trial_error(0, [], trial)
    assert record.trials[1].status is Status.finished
    assert read_trials(record.ledger, **OWNER)[1].status is Status.finished


def test_a_trial_whose_process_was_lost_is_run_again_for_some_times(
    record: SweepRecord, tmp_path: Path
) -> None:
    """Then it has failed, so that the sweep can end."""
    trial = tune_trial(tmp_path, 1, ActorDiedError())
    for _ in range(MAX_STARTS - 1):
        callback = recorder(record)
        callback.on_trial_start(0, [], trial)
        callback.on_trial_error(0, [], trial)
        callback.end_interrupted(deadline_s=1)
        assert callback.lost == {1}
        assert not read_trials(record.ledger, **OWNER)[1].has_ended
    callback = recorder(record)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_error(0, [], trial)
    assert callback.lost == set()
    assert read_trials(record.ledger, **OWNER)[1].reason == "ActorDiedError"


def test_a_process_that_was_lost_before_its_start_counts_as_a_start(
    record: SweepRecord, tmp_path: Path
) -> None:
    """Tune then reports only the error. The trial is run again, also in a sweep that continues."""
    trial = tune_trial(tmp_path, 1, ActorDiedError())
    for starts in range(1, MAX_STARTS + 1):
        callback = recorder(record)
        callback.on_trial_error(0, [], trial)
        assert callback.lost == ({1} if starts < MAX_STARTS else set())
        assert read_trials(record.ledger, **OWNER)[1].starts == starts
    assert read_trials(record.ledger, **OWNER)[1].reason == "ActorDiedError"


class KilledTuner:
    """Starts two trials. Then Ray's memory monitor kills one, and Tune ends with the error that it does not expect."""

    def __init__(self, recorder: Recorder, folder: Path, error: Exception) -> None:
        self._recorder, self._folder, self._error = recorder, folder, error

    def fit(self) -> None:
        for number in (1, 2):
            self._recorder.on_trial_start(0, [], tune_trial(self._folder, number))
        self._recorder.on_trial_result(0, [], tune_trial(self._folder, 1), REPORT)
        self._recorder.on_trial_complete(0, [], tune_trial(self._folder, 1))
        raise RuntimeError(f"Caught unexpected exception: {self._error}") from self._error


def run_killed(
    record: SweepRecord, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception = OUT_OF_MEMORY
) -> None:
    def build_tuner(_sweep: Any, _search: Any, _scheduler: Any, recorder: Recorder, **_: Any) -> KilledTuner:
        return KilledTuner(recorder, folder, error)

    monkeypatch.setattr(tuning, "build_tuner", build_tuner)
    runs: Any = None
    run_trials(sweep("lightgbm", trials=2), record, runs=runs, concurrent=2)


def test_a_trial_that_ray_kills_for_memory_is_run_again(
    record: SweepRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune ends with a traceback. The sweep ends with its one line, and fails the trial after some starts."""
    with pytest.raises(TrainingFailed, match=r"were lost, .*: 2\. `run=s` continues the sweep"):
        run_killed(record, tmp_path, monkeypatch)
    trials = read_trials(record.ledger, **OWNER)
    assert [trial.status for trial in trials.values()] == [Status.finished, Status.running]
    record.trials[2].starts = MAX_STARTS - 1
    with pytest.raises(TrainingFailed):
        run_killed(record, tmp_path, monkeypatch)
    assert read_trials(record.ledger, **OWNER)[2].reason == "OutOfMemoryError"


def test_another_error_of_tune_keeps_its_traceback(
    record: SweepRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing about memory."""
    with pytest.raises(RuntimeError, match="a bug"):
        run_killed(record, tmp_path, monkeypatch, ValueError("a bug"))


def test_the_time_budget_stops_trials(record: SweepRecord, tmp_path: Path) -> None:
    """A trial with a loss keeps it. One without has failed after some starts. Ended trials stay as they are."""
    callback = recorder(record)
    for _ in range(MAX_STARTS - 1):
        callback.on_trial_start(0, [], tune_trial(tmp_path, 3))
    for number in (1, 2, 3):
        callback.on_trial_start(0, [], tune_trial(tmp_path, number))
    callback.on_trial_result(0, [], tune_trial(tmp_path, 1), REPORT)
    callback.on_trial_result(0, [], tune_trial(tmp_path, 2), REPORT)
    callback.on_trial_complete(0, [], tune_trial(tmp_path, 2))
    callback.end_interrupted(deadline_s=9)
    trials = read_trials(record.ledger, **OWNER)
    assert [trial.status for trial in trials.values()] == [Status.stopped, Status.finished, Status.failed]
    assert record.trials[3].cause == "ended before its first report (sweep.trial_deadline_s is 9)"


def test_the_time_budget_does_not_end_trials_without_a_loss(
    record: SweepRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 1 had a loss before a kill, and does not start again in time. Trial 2 starts, and has no report yet."""
    earlier = recorder(record)
    earlier.on_trial_start(0, [], tune_trial(tmp_path, 1))
    earlier.on_trial_result(0, [], tune_trial(tmp_path, 1), REPORT)

    def build_tuner(_sweep: Any, _search: Any, _scheduler: Any, recorder: Recorder, **_: Any) -> Any:
        return SimpleNamespace(fit=lambda: recorder.on_trial_start(0, [], tune_trial(tmp_path, 2)))

    monkeypatch.setattr(tuning, "build_tuner", build_tuner)
    runs: Any = None
    options = {"trials": 2, "trial_deadline_s": 9}
    with pytest.raises(TrainingFailed, match=r"trial_deadline_s=9 ended .*: 1, 2\. Raise it; `run=s`"):
        run_trials(sweep("lightgbm", **options), record, runs=runs, concurrent=2)
    trials = read_trials(record.ledger, **OWNER)
    assert [trial.status for trial in trials.values()] == [Status.running, Status.running]


def sweep(family: str, **options: Any) -> Sweep:
    config = SweepConfig(name="m", training_set="t", label="y", sweep=SearchConfig(**options))
    data: Any = None
    return Sweep(config=config, family=resolve_family({"family": family}), space={}, data=data)


@pytest.mark.parametrize(
    ("family", "options", "available", "expected"),
    [
        ("tabular_network", {"concurrent_trials": 4}, 3.9, 3),
        ("tabular_network", {"concurrent_trials": 2}, 8.0, 2),
        ("tabular_network", {"concurrent_trials": 4, "num_workers": 2}, 5.0, 2),
        ("lightgbm", {"concurrent_trials": 4, "num_workers": 2}, 5.0, 2),
    ],
)
def test_trials_run_at_once_as_far_as_there_are_cpus(
    family: str, options: dict[str, Any], available: float, expected: int
) -> None:
    """Only networks have workers. LightGBM needs a CPU for each thread."""
    assert concurrent_trials(sweep(family, **options), available=available, where="") == expected


def test_too_few_cpus_for_a_trial_are_refused() -> None:
    """It would wait for ever."""
    with pytest.raises(ConfigError, match=r"needs 2\.5 logical CPUs, but this node has 2 beside serving"):
        concurrent_trials(sweep("tabular_network", num_workers=2), available=2, where="this node")


@pytest.mark.parametrize(
    ("file_system", "region", "module", "expected"),
    [
        ("shared", None, None, False),
        (None, None, None, True),
        ("shared", "eu", None, True),
        ("shared", None, "own", True),
    ],
)
def test_trials_that_need_this_node_stay_here(
    file_system: str | None, region: str | None, module: str | None, expected: bool
) -> None:
    """Then only the CPUs of this node count."""
    planned = sweep("lightgbm")
    planned.config.placement.region = region
    if module:
        planned = replace(planned, family=resolve_family({"family": "mine", "module": plain_fit.__name__}))
    runs: Any = SimpleNamespace(file_system=file_system)
    assert stays_here(planned, runs) == expected


def test_an_interrupted_trial_is_described_by_its_parameters() -> None:
    """For messages and tables."""
    assert Trial(number=1, parameters={"a": 0.123456, "b": "x"}).describe_parameters() == "a=0.123 b=x"
