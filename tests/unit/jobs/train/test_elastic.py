"""The number of workers of a run: how many there is room for, and when a run starts again with more or fewer."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import TrainingFailed
from cluster.placement import ScalingConfig
from jobs.train.memory import MAX_RESTARTS
from jobs.train.network import elastic
from jobs.train.network.elastic import (
    RESIZED,
    GrowthWatch,
    WorkerRange,
    WorkersDied,
    WorkersNotStarted,
    run_elastic,
    wait_for_room,
)
from jobs.train.network.fit import failure_config


def workers(smallest: int = 1, largest: int = 4, *, batch_rows: int = 24) -> WorkerRange:
    scaling = ScalingConfig(num_workers=[smallest, largest], cpus_per_worker=2)
    return WorkerRange.of(scaling, batch_rows=batch_rows, accumulation=1, selector={})


def cpus(**nodes: float) -> dict[str, dict[str, float]]:
    return {name: {"CPU": free} for name, free in nodes.items()}


def test_a_number_of_workers_divides_the_batch_and_is_on_one_node() -> None:
    """The free CPUs of two nodes do not add up. Workers that run already need no other room."""
    assert workers().fitting(cpus(a=7, b=3)) == 3
    assert workers(batch_rows=20).fitting(cpus(a=7)) == 2
    assert workers(2, 4).fitting(cpus(a=3, b=3)) == 0
    assert workers().fitting(cpus(a=3, b=5), held=2, node="a") == 3
    assert workers().fitting({}) == 0


@pytest.mark.parametrize("wrong", [[2, 1], [1], [1, 2, 3], [0, 2], ["1", 2], 0, True, "two"])
def test_a_wrong_number_of_workers_is_refused(wrong: Any) -> None:
    """The message names the option."""
    with pytest.raises(ValueError, match=r"scaling\.num_workers must be"):
        ScalingConfig(num_workers=wrong)
    recorded = ScalingConfig(num_workers="[1, 2]")  # as the record of a cluster has it
    assert (recorded.min_workers, recorded.max_workers, recorded.is_elastic) == (1, 2, True)
    assert ScalingConfig(num_workers="3").max_workers == 3


def test_a_start_waits_a_moment_for_all_workers_and_then_takes_fewer() -> None:
    """The workers of the last start may not be removed yet."""
    slept: list[float] = []
    rooms = iter([cpus(a=1), cpus(a=9)])
    assert wait_for_room(workers(), room=lambda: next(rooms), sleep=slept.append) == 4
    assert len(slept) == 1
    assert wait_for_room(workers(), room=lambda: cpus(a=2.5), sleep=slept.append) == 1
    assert sum(slept[1:]) == elastic.SETTLE_S


def test_no_room_for_the_smallest_number_ends_the_run() -> None:
    """The message names the settings to change."""
    with pytest.raises(TrainingFailed, match=r"scaling\.cpus_per_worker"):
        wait_for_room(workers(), room=lambda: cpus(a=1.5), sleep=lambda seconds: None)


def test_a_run_grows_when_there_was_room_twice() -> None:
    """Room that another task takes at once does not count. A run that has all its workers does not look."""
    seen: Iterator[dict[str, dict[str, float]]] = iter(
        [cpus(a=2, b=2), cpus(a=0), cpus(a=2), cpus(a=2), cpus(a=2)]
    )
    watch = GrowthWatch(workers(1, 2), held=1, node="a", room=lambda: next(seen))
    assert [watch() for _ in range(4)] == [False, False, False, True]
    assert not GrowthWatch(workers(1, 2), held=2, node="a", room=dict)()


def test_a_run_is_started_until_it_is_finished() -> None:
    """It loses a worker, goes on with one, gets the other back, and finishes. A start without room is no death."""
    starts: list[tuple[int, int]] = []
    rooms = iter([cpus(a=4), cpus(a=4), *[cpus(a=2)] * 11, cpus(a=4)])
    ends = iter(
        [
            WorkersNotStarted("room was taken"),
            WorkersDied("died"),
            SimpleNamespace(return_value=RESIZED),
            SimpleNamespace(return_value=None),
        ]
    )

    def fit(number: int, start: int) -> Any:
        starts.append((number, start))
        end = next(ends)
        if isinstance(end, Exception):
            raise end
        return end

    run_elastic(workers(1, 2), fit, max_restarts=1, room=lambda: next(rooms), sleep=lambda seconds: None)
    assert starts == [(2, 1), (2, 2), (1, 3), (2, 4)]


def test_ray_train_does_not_start_the_workers_of_an_elastic_run() -> None:
    """By default, it would try to start them without end."""
    elastic_run: Any = failure_config(is_elastic=True)
    assert (elastic_run.max_failures, elastic_run.controller_failure_limit) == (0, 0)
    assert failure_config(is_elastic=False).max_failures == MAX_RESTARTS


def test_a_run_whose_workers_die_too_often_fails() -> None:
    """The last error is raised. Another error is raised at once."""
    deaths = 0

    def fit(number: int, start: int) -> Any:
        nonlocal deaths
        deaths += 1
        raise WorkersDied("died")

    with pytest.raises(WorkersDied):
        run_elastic(workers(), fit, max_restarts=2, room=lambda: cpus(a=8))
    assert deaths == 3

    starts = 0

    def never_start(number: int, start: int) -> Any:
        nonlocal starts
        starts += 1
        raise WorkersNotStarted("no room")

    with pytest.raises(WorkersNotStarted):
        run_elastic(workers(), never_start, max_restarts=2, room=lambda: cpus(a=8))
    assert starts == 3

    def diverge(number: int, start: int) -> Any:
        raise TrainingFailed("nan")

    with pytest.raises(TrainingFailed, match="nan"):
        run_elastic(workers(), diverge, max_restarts=2, room=lambda: cpus(a=8))
