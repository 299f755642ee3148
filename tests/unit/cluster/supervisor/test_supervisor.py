"""Tests of the supervisor's decisions, with a fake machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from prometheus_client import CollectorRegistry

from cluster.errors import FalajError
from cluster.node.parts import Part
from cluster.session import write_record
from cluster.settings import PlatformConfig, StorageConfig
from cluster.supervisor.__main__ import is_recorded
from cluster.supervisor.metrics import SupervisorMetrics
from cluster.supervisor.watch import GCS_TRIES, SILENT_S, STOPPED_S, YOUNG_S, Supervisor
from tests.servers.replica import record


@dataclass
class Process:
    """A fake process of a part, with psutil's interface."""

    state: str = psutil.STATUS_SLEEPING
    age_s: float = 1000.0

    def is_running(self) -> bool:
        return self.state != psutil.STATUS_DEAD

    def status(self) -> str:
        return self.state

    def create_time(self) -> float:
        return time.time() - self.age_s


@dataclass
class FakeMachine:
    """A fake machine. Started parts run, unless they are in `broken`."""

    parts: dict[Part, Process] = field(default_factory=lambda: {part: Process() for part in Part})
    silent: set[Part] = field(default_factory=set)
    broken: set[Any] = field(default_factory=set)
    """Parts that die as soon as they are started, and names of operations that raise: "start", "head", "restore"."""
    due: bool = False
    actions: list[str] = field(default_factory=list)

    def find(self) -> dict[Part, psutil.Process]:
        found: dict[Part, Any] = {part: one for part, one in self.parts.items() if one.is_running()}
        return found

    def answers(self, part: Part) -> bool:
        return part not in self.silent

    def start(self, part: Part) -> bool:
        self.actions.append(f"start {part}")
        if "start" in self.broken:
            raise OSError("No space left on device")
        if part not in self.broken:
            self.parts[part] = Process(age_s=0)
        return True

    def kill(self, process: psutil.Process) -> None:
        cast(Process, process).state = psutil.STATUS_DEAD
        self.actions.append("kill")

    def resume(self, process: psutil.Process) -> None:
        cast(Process, process).state = psutil.STATUS_SLEEPING
        self.actions.append("resume")

    def restore_is_due(self) -> bool:
        return self.due

    def replace_head(self) -> None:
        self.due = True
        self.actions.append("head")
        if "head" in self.broken:
            raise FalajError("Ray did not start")
        self.parts |= {Part.gcs: Process(), Part.raylet: Process()}

    def restore(self) -> None:
        self.actions.append("restore")
        if "restore" in self.broken:
            raise FalajError("m-v1 did not start")
        self.due = False


@dataclass
class World:
    machine: FakeMachine = field(default_factory=FakeMachine)
    now: float = 1000.0
    restarts: list[tuple[str, str, int]] = field(default_factory=list)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(
            self.machine,
            record_restart=lambda *restart: self.restarts.append(restart),
            metrics=SupervisorMetrics(self.registry),
            clock=lambda: self.now,
        )

    def pass_s(self, seconds: float) -> None:
        """Run one check per second, and wait for a thread that rebuilds the head."""
        for _ in range(round(seconds)):
            self.supervisor.check_once()
            if self.supervisor.rebuilding is not None:
                self.supervisor.rebuilding.join(10)
            self.now += 1.0

    def kill(self, part: Part) -> None:
        self.machine.parts[part].state = psutil.STATUS_DEAD

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def world() -> World:
    return World()


def test_running_cluster_is_left_alone(world: World) -> None:
    """In ten minutes, nothing is started or recorded."""
    world.pass_s(600)
    assert (world.machine.actions, world.restarts) == ([], [])


def test_part_that_the_cluster_does_not_have_is_not_started(world: World) -> None:
    world.supervisor = Supervisor(
        world.machine,
        record_restart=lambda *restart: world.restarts.append(restart),
        metrics=SupervisorMetrics(CollectorRegistry()),
        parts=[part for part in Part if part is not Part.uploader],
        clock=lambda: world.now,
    )
    world.kill(Part.uploader)
    world.pass_s(10)
    assert world.machine.actions == []


@pytest.mark.parametrize("part", [part for part in Part if part not in (Part.supervisor, Part.raylet)])
def test_dead_part_restarts_at_once(world: World, part: Part) -> None:
    """The restart is recorded and counted."""
    world.pass_s(2)
    world.kill(part)
    world.pass_s(3)
    assert world.machine.actions == [f"start {part}"]
    assert world.restarts == [(part.value, "dead", 1)]
    assert world.count("falaj_supervisor_restarts_total", part=part.value, reason="dead") == 1
    assert world.count("falaj_part_up", part=part.value) == 1


def test_failing_part_is_retried_with_growing_waits(world: World) -> None:
    """Waits grow to one minute. After a minute of running, the count of attempts starts again."""
    world.machine.broken.add(Part.broker)
    world.kill(Part.broker)
    world.pass_s(60)
    assert len(world.machine.actions) == 6
    world.pass_s(600)
    assert len(world.machine.actions) <= 6 + 11
    assert [attempt for _, _, attempt in world.restarts] == [1, 2, 4, 8, 16]
    world.machine.broken.clear()
    world.pass_s(61)
    world.pass_s(61)
    world.kill(Part.broker)
    world.pass_s(1)
    assert world.restarts[-1] == (Part.broker.value, "dead", 1)


def test_retry_now_skips_the_wait(world: World) -> None:
    """`cluster.up` uses this."""
    world.machine.broken.add(Part.edge)
    world.kill(Part.edge)
    world.pass_s(130)
    num_tries = len(world.machine.actions)
    world.supervisor.retry_now()
    world.pass_s(1)
    assert len(world.machine.actions) == num_tries + 1


@pytest.mark.parametrize("part", [part for part in Part if part is not Part.supervisor])
def test_stopped_part_is_resumed_after_a_while(world: World, part: Part) -> None:
    """It is not resumed at once, because a debugger may stop it briefly. A stopped raylet needs no new head."""
    world.machine.parts[part].state = psutil.STATUS_STOPPED
    world.pass_s(STOPPED_S)
    assert world.machine.actions == []
    world.pass_s(2)
    assert world.machine.actions == ["resume"]
    assert world.restarts == [(part.value, "stopped", 1)]


def test_silent_part_is_replaced_unless_it_is_young(world: World) -> None:
    """On a busy machine, a new part may need a minute to start."""
    world.machine.silent.add(Part.broker)
    world.machine.parts[Part.broker].age_s = YOUNG_S - 5
    world.pass_s(SILENT_S + 5)
    assert world.machine.actions == []
    world.machine.parts[Part.broker].age_s = YOUNG_S + 5
    world.pass_s(1)
    assert world.machine.actions == ["kill", f"start {Part.broker}"]


def test_failed_starts_do_not_end_the_supervisor(world: World) -> None:
    """Failures, such as a full disk, are counted and tried again."""
    world.machine.broken.add("start")
    world.kill(Part.broker)
    world.kill(Part.edge)
    world.pass_s(5)
    assert {f"start {Part.broker}", f"start {Part.edge}"} == set(world.machine.actions)
    assert world.restarts == []
    assert world.count("falaj_supervisor_failures_total", part=Part.broker.value) == 3
    world.machine.broken.clear()
    world.pass_s(10)
    assert {name for name, _, _ in world.restarts} == {Part.broker.value, Part.edge.value}


def test_dead_raylet_leads_to_a_new_head_and_restored_applications(world: World) -> None:
    """Broker and edge keep running."""
    world.pass_s(2)
    world.kill(Part.raylet)
    world.pass_s(5)
    assert world.machine.actions == ["head", "restore"]
    assert world.restarts == [("Ray head", "dead", 1)]
    assert world.count("falaj_supervisor_recovery_seconds_count") == 1


def test_gcs_that_always_dies_leads_to_a_new_head(world: World) -> None:
    """Its stored state may be damaged, and a new head starts with an empty one."""
    world.machine.broken.add(Part.gcs)
    world.kill(Part.gcs)
    world.pass_s(20)
    assert world.machine.actions == [*[f"start {Part.gcs}"] * GCS_TRIES, "head", "restore"]


def test_failed_restore_does_not_replace_the_head_again(world: World) -> None:
    """The restore is retried with growing waits, and parts are still watched."""
    world.machine.broken.add("restore")
    world.kill(Part.raylet)
    world.pass_s(20)
    assert world.machine.actions.count("head") == 1
    assert 3 <= world.machine.actions.count("restore") <= 6
    world.kill(Part.broker)
    world.machine.broken.clear()
    world.pass_s(61)
    assert not world.machine.due
    assert f"start {Part.broker}" in world.machine.actions


def test_permanently_failing_restore_is_retried_rarely(world: World) -> None:
    """In two hours there are at most 40 tries, because each try adds events."""
    world.machine.broken.add("restore")
    world.machine.due = True
    world.pass_s(7200)
    assert 20 <= world.machine.actions.count("restore") <= 40


def test_damaged_record_counts_as_this_cluster(tmp_path: Path) -> None:
    """Without a record, or with another cluster's record, the supervisor ends."""
    config = PlatformConfig(storage=StorageConfig(root=str(tmp_path)))
    cluster = record(tmp_path, "", 1)
    assert not is_recorded(config, cluster)
    write_record(cluster, config.storage)
    assert is_recorded(config, cluster)
    (tmp_path / "cluster.json").write_text("{")
    assert is_recorded(config, cluster)
    write_record(replace(cluster, cluster_id="another"), config.storage)
    assert not is_recorded(config, cluster)


def test_restarted_supervisor_continues_a_due_restore(world: World) -> None:
    """The previous supervisor was killed between head and applications."""
    world.machine.due = True
    world.pass_s(3)
    assert world.machine.actions == ["restore"]


def test_failed_head_start_is_retried(world: World) -> None:
    """The applications are restored once the head runs."""
    world.machine.broken.add("head")
    world.kill(Part.raylet)
    world.pass_s(5)
    assert set(world.machine.actions) == {"head"}
    world.machine.broken.clear()
    world.pass_s(10)
    assert world.machine.actions[-2:] == ["head", "restore"]
