"""What the supervisor starts again, when, and what it leaves alone; the machine is a fake, the decisions are real."""

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
from tests.replica import record


@dataclass
class Process:
    """A part's process; psutil's words."""

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
    """A machine whose parts come back unless they are among the broken."""

    parts: dict[Part, Process] = field(default_factory=lambda: {part: Process() for part in Part})
    silent: set[Part] = field(default_factory=set)
    broken: set[Any] = field(default_factory=set)
    """Parts that die as soon as they are started; "start" and "restore" for what raises."""
    due: bool = False
    done: list[str] = field(default_factory=list)

    def find(self) -> dict[Part, psutil.Process]:
        return cast(
            dict[Part, psutil.Process], {part: one for part, one in self.parts.items() if one.is_running()}
        )

    def answers(self, part: Part) -> bool:
        return part not in self.silent

    def start(self, part: Part) -> bool:
        self.done.append(f"start {part}")
        if "start" in self.broken:
            raise OSError("No space left on device")
        if part not in self.broken:
            self.parts[part] = Process(age_s=0)
        return True

    def kill(self, process: psutil.Process) -> None:
        cast(Process, process).state = psutil.STATUS_DEAD
        self.done.append("kill")

    def resume(self, process: psutil.Process) -> None:
        cast(Process, process).state = psutil.STATUS_SLEEPING
        self.done.append("resume")

    def restore_is_due(self) -> bool:
        return self.due

    def replace_head(self) -> None:
        self.due = True
        self.done.append("head")
        if "head" in self.broken:
            raise FalajError("Ray did not start")
        self.parts |= {Part.gcs: Process(), Part.raylet: Process()}

    def restore(self) -> None:
        self.done.append("restore")
        if "restore" in self.broken:
            raise FalajError("m-v1 did not start")
        self.due = False


@dataclass
class World:
    machine: FakeMachine = field(default_factory=FakeMachine)
    now: float = 1000.0
    notes: list[tuple[str, str, int]] = field(default_factory=list)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(
            self.machine,
            record_restart=lambda *words: self.notes.append(words),
            metrics=SupervisorMetrics(self.registry),
            clock=lambda: self.now,
        )

    def pass_s(self, seconds: float) -> None:
        """A turn a second; a head that is being rebuilt is waited for."""
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


def test_a_cluster_that_runs_is_left_alone(world: World) -> None:
    """For ten minutes."""
    world.pass_s(600)
    assert (world.machine.done, world.notes) == ([], [])


@pytest.mark.parametrize("part", [part for part in Part if part not in (Part.supervisor, Part.raylet)])
def test_every_part_that_dies_is_started_at_once(world: World, part: Part) -> None:
    """With an event and a count."""
    world.pass_s(2)
    world.kill(part)
    world.pass_s(3)
    assert world.machine.done == [f"start {part}"]
    assert world.notes == [(part.value, "dead", 1)]
    assert world.count("falaj_supervisor_restarts_total", part=part.value, reason="dead") == 1
    assert world.count("falaj_part_up", part=part.value) == 1


def test_what_cannot_start_is_tried_less_and_less_often(world: World) -> None:
    """At most once a minute in the end; when it has run well for a minute, its next death counts as its first."""
    world.machine.broken.add(Part.broker)
    world.kill(Part.broker)
    world.pass_s(60)
    assert len(world.machine.done) == 6
    world.pass_s(600)
    assert len(world.machine.done) <= 6 + 11
    assert [attempt for _, _, attempt in world.notes] == [1, 2, 4, 8, 16]
    world.machine.broken.clear()
    world.pass_s(61)
    world.pass_s(61)
    world.kill(Part.broker)
    world.pass_s(1)
    assert world.notes[-1] == (Part.broker.value, "dead", 1)


def test_it_tries_at_once_when_told_to(world: World) -> None:
    """As `cluster.up` tells it."""
    world.machine.broken.add(Part.edge)
    world.kill(Part.edge)
    world.pass_s(130)
    tried = len(world.machine.done)
    world.supervisor.retry_now()
    world.pass_s(1)
    assert len(world.machine.done) == tried + 1


@pytest.mark.parametrize("part", [part for part in Part if part is not Part.supervisor])
def test_a_stopped_part_is_told_to_go_on(world: World, part: Part) -> None:
    """Not at once: a debugger may have stopped it for a moment. A stopped raylet is no lost head."""
    world.machine.parts[part].state = psutil.STATUS_STOPPED
    world.pass_s(STOPPED_S)
    assert world.machine.done == []
    world.pass_s(2)
    assert world.machine.done == ["resume"]
    assert world.notes == [(part.value, "stopped", 1)]


def test_a_part_that_does_not_answer_is_replaced_unless_it_is_young(world: World) -> None:
    """A new one may take a minute to start on a busy machine."""
    world.machine.silent.add(Part.broker)
    world.machine.parts[Part.broker].age_s = YOUNG_S - 5
    world.pass_s(SILENT_S + 5)
    assert world.machine.done == []
    world.machine.parts[Part.broker].age_s = YOUNG_S + 5
    world.pass_s(1)
    assert world.machine.done == ["kill", f"start {Part.broker}"]


def test_nothing_ends_it(world: World) -> None:
    """A full disk, say: it goes on trying, and counts it."""
    world.machine.broken.add("start")
    world.kill(Part.broker)
    world.kill(Part.edge)
    world.pass_s(5)
    assert {f"start {Part.broker}", f"start {Part.edge}"} == set(world.machine.done)
    assert world.notes == []
    assert world.count("falaj_supervisor_failures_total", part=Part.broker.value) == 3
    world.machine.broken.clear()
    world.pass_s(10)
    assert {name for name, _, _ in world.notes} == {Part.broker.value, Part.edge.value}


def test_a_lost_raylet_means_a_new_head_with_its_applications(world: World) -> None:
    """Broker and edge are not touched."""
    world.pass_s(2)
    world.kill(Part.raylet)
    world.pass_s(5)
    assert world.machine.done == ["head", "restore"]
    assert world.notes == [("Ray head", "dead", 1)]
    assert world.count("falaj_supervisor_recovery_seconds_count") == 1


def test_a_gcs_that_does_not_stay_means_a_new_head(world: World) -> None:
    """Its store may be damaged; the new head begins with an empty one."""
    world.machine.broken.add(Part.gcs)
    world.kill(Part.gcs)
    world.pass_s(20)
    assert world.machine.done == [*[f"start {Part.gcs}"] * GCS_TRIES, "head", "restore"]


def test_applications_that_do_not_start_cost_no_second_head(world: World) -> None:
    """They are tried again, less and less often, and the parts are watched meanwhile."""
    world.machine.broken.add("restore")
    world.kill(Part.raylet)
    world.pass_s(20)
    assert world.machine.done.count("head") == 1
    assert 3 <= world.machine.done.count("restore") <= 6
    world.kill(Part.broker)
    world.machine.broken.clear()
    world.pass_s(61)
    assert not world.machine.due
    assert f"start {Part.broker}" in world.machine.done


def test_an_application_that_can_never_start_fills_no_ledger(world: World) -> None:
    """Its files were altered, say: each try is an event or two, so in two hours there are few."""
    world.machine.broken.add("restore")
    world.machine.due = True
    world.pass_s(7200)
    assert 20 <= world.machine.done.count("restore") <= 40


def test_a_damaged_record_names_no_other_cluster(tmp_path: Path) -> None:
    """So its supervisor goes on; it ends where the record is gone, or is another cluster's."""
    config = PlatformConfig(storage=StorageConfig(root=str(tmp_path)))
    mine = record(tmp_path, "", 1)
    assert not is_recorded(config, mine)
    write_record(mine, config.storage)
    assert is_recorded(config, mine)
    (tmp_path / "cluster.json").write_text("{")
    assert is_recorded(config, mine)
    write_record(replace(mine, cluster_id="another"), config.storage)
    assert not is_recorded(config, mine)


def test_a_supervisor_that_was_killed_between_head_and_applications_goes_on_there(world: World) -> None:
    """The next one finds that the restoring is due."""
    world.machine.due = True
    world.pass_s(3)
    assert world.machine.done == ["restore"]


def test_a_head_that_does_not_start_is_tried_again(world: World) -> None:
    """With the applications once it does."""
    world.machine.broken.add("head")
    world.kill(Part.raylet)
    world.pass_s(5)
    assert set(world.machine.done) == {"head"}
    world.machine.broken.clear()
    world.pass_s(10)
    assert world.machine.done[-2:] == ["head", "restore"]
