"""A worker that was killed for memory, a divergence or a refusal ends a run in one line. Other deaths do not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.errors import ConfigError, RefusedError, TrainingFailed
from jobs.train import memory
from jobs.train.memory import count_kernel_kills, run_task, was_killed_by_ray
from jobs.train.network import failures
from jobs.train.network.elastic import WorkersDied, WorkersNotStarted
from jobs.train.network.failures import EndOfHopelessRuns, is_out_of_memory, reason_of

MONITOR = "1 worker(s) were killed due to the node running low on memory. The node's memory was 0.96 used."
"""What Ray's memory monitor writes into the error of an actor."""


class Kernel:
    """The kernel's count of kills for memory, as a test sets it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "vmstat"
        self.set(3)

    def set(self, kills: int) -> None:
        self._file.write_text(f"pgfault 7\noom_kill {kills}\n")

    @property
    def file(self) -> Path:
        return self._file


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path)
    monkeypatch.setattr(memory, "_KERNEL_COUNTERS", kernel.file)
    monkeypatch.setattr(failures, "_kills_on", lambda node: count_kernel_kills())
    return kernel


def died(text: str = "The worker process has died.") -> Exception:
    """Return the error of a worker that does not answer any more."""
    return WorkerHealthCheckFailedError("dead", failure=RayActorError(error_msg=text))


def ended(error: Exception, *, kills: int = 3) -> None:
    """Tell the callback that two workers started with a count of kills, and that one ended with an error."""
    callback = EndOfHopelessRuns()
    callback.after_report(None, [{"node_id": "a", "oom_kills": kills}, {"validation_loss": 0.1}], None)
    callback.after_exception(None, {1: error})


def test_a_worker_that_rays_monitor_killed_ends_the_run(kernel: Kernel) -> None:
    """The message names the settings to change."""
    for error in (died(MONITOR), OutOfMemoryError(MONITOR)):
        assert was_killed_by_ray(error)
        with pytest.raises(TrainingFailed, match=r"too little memory\. Lower model\.batch_size"):
            ended(error)


def test_a_worker_that_the_kernel_killed_ends_the_run(kernel: Kernel) -> None:
    """The kernel's count of such kills has grown since the start. Another SIGKILL is tried again."""
    ended(died())
    kernel.set(4)
    with pytest.raises(TrainingFailed, match="too little memory"):
        ended(died())
    ended(died(), kills=4)


def test_a_kill_of_another_process_is_not_the_cause_of_a_workers_own_error(kernel: Kernel) -> None:
    """The worker did not die, so the kernel did not kill it. Ray Train then tries again."""
    kernel.set(4)
    ended(UserExceptionWithTraceback(ZeroDivisionError("in loss"), "Traceback …"))


@pytest.mark.parametrize("error", [TrainingFailed("the loss is nan"), ConfigError("the file was replaced")])
def test_a_workers_own_reason_ends_the_run(kernel: Kernel, error: Exception) -> None:
    """It gets through Ray Train's errors, also between processes."""
    with pytest.raises(type(error), match=str(error)):
        ended(error)
    raised = pickle.loads(pickle.dumps(ControllerError(error)))  # noqa: S301 (our own)
    reason = reason_of(raised)
    assert isinstance(reason, RefusedError | TrainingFailed)
    assert str(reason) == str(error)


def test_a_worker_that_hangs_counts_as_dead() -> None:
    """Its health checks time out. An elastic run then starts again."""
    hung = WorkerGroupError("long", {0: WorkerHealthCheckTimeoutError("no answer")})
    assert isinstance(reason_of(hung), WorkersDied)


def test_workers_that_cannot_start_are_told_from_dead_ones() -> None:
    """An elastic run counts the room again."""
    error = pickle.loads(pickle.dumps(ControllerError(WorkerGroupStartupTimeoutError(2))))  # noqa: S301 (our own)
    assert isinstance(reason_of(error), WorkersNotStarted)


def test_repeated_deaths_are_one_line_and_an_error_in_a_family_keeps_its_traceback() -> None:
    """A user needs the traceback of an error in the user's own code."""
    reason = reason_of(WorkerGroupError("long", {0: died()}))
    assert isinstance(reason, WorkersDied)
    assert "run=" in str(reason)
    assert reason_of(WorkerGroupError("long", {0: ZeroDivisionError("in loss")})) is None


def test_memory_that_python_or_torch_cannot_get_is_recognised() -> None:
    """PyTorch has no class for it on a CPU."""
    torch_error = RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 36 TB"
    )
    assert is_out_of_memory(torch_error)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_task_that_was_killed_for_memory_is_not_started_again(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task whose process died otherwise is."""
    ends: list[Any] = []

    def get(reference: Any) -> Any:
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    def start() -> None:
        started.append(1)

    monkeypatch.setattr(ray, "get", get)
    started: list[int] = []
    ends = [WorkerCrashedError(), WorkerCrashedError(), "fitted"]
    assert run_task(start, too_little_memory="small") == "fitted"
    assert len(started) == 3
    started, ends = [], [OutOfMemoryError(MONITOR), "fitted"]
    with pytest.raises(TrainingFailed, match="small"):
        run_task(start, too_little_memory="small")
    assert len(started) == 1
    started, ends = (
        [],
        [WorkerCrashedError(), NodeDiedError("lost"), LocalRayletDiedError(), NodeDiedError("lost")],
    )
    with pytest.raises(TrainingFailed, match="died again and again"):
        run_task(start, too_little_memory="small")
    assert len(started) == 4
