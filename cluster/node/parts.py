"""The parts of a cluster on this machine, and whether each of them runs.

A part is known by its command line among the cluster's processes, never by a pid that somebody wrote down: pids are
used again, and a part that was started by hand counts as well.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster import processes
from cluster.security.keys.client import broker_answers
from cluster.session import ClusterRecord


class Part(enum.StrEnum):
    """A process that a cluster cannot do without. Replicas and Ray's workers are Ray's own to start again."""

    gcs = "Ray GCS"
    raylet = "raylet"
    dashboard = "Ray dashboard"
    monitor = "Ray autoscaler"
    log_monitor = "Ray log monitor"
    client_server = "Ray client server"
    broker = "key broker"
    edge = "edge controller"
    haproxy = "edge"
    supervisor = "supervisor"


class State(enum.StrEnum):
    """How a part is."""

    running = "running"
    stopped = "stopped"
    """It is there, and somebody has sent it SIGSTOP."""
    silent = "does not answer"
    dead = "dead"


BROKER, EDGE, SUPERVISOR = "cluster.security.keys", "serve_apps.edge", "cluster.supervisor"
_OURS = {Part.broker: BROKER, Part.edge: EDGE, Part.supervisor: SUPERVISOR}
_NAMES = {Part.gcs: "gcs_server", Part.raylet: "raylet"}
_PROGRAMS = {
    Part.dashboard: "/ray/dashboard/dashboard.py",
    Part.monitor: "/ray/autoscaler/_private/monitor.py",
    Part.log_monitor: "/ray/_private/log_monitor.py",
}
_CLIENT_SERVER = "ray.util.client.server"
RAYS_OWN = (Part.gcs, Part.raylet, Part.dashboard, Part.monitor, Part.log_monitor, Part.client_server)
"""What `ray start` starts, and nobody starts again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A part as it was found."""

    part: Part
    state: State
    process: psutil.Process | None = None


def look(record: ClusterRecord) -> list[Seen]:
    """Every part of a cluster, as it is now."""
    there = sort_out(processes.find(record.cluster_id, owner=record.owner))
    return [
        Seen(part=part, state=probed(part, state_of(there.get(part)), record), process=there.get(part))
        for part in Part
    ]


def missing(seen: Iterable[Seen]) -> list[Seen]:
    """The parts that do not run."""
    return [one for one in seen if one.state is not State.running]


def named(seen: Iterable[Seen]) -> str:
    """Parts and how they are, for a message."""
    return ", ".join(f"{one.part} ({one.state})" for one in seen)


def sort_out(found: Iterable[psutil.Process]) -> dict[Part, psutil.Process]:
    """Which process is which part; the newest where there are two, as while an edge hands over."""
    there: dict[Part, psutil.Process] = {}
    for process in sorted(found, key=_age):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            part = part_of(process.name(), process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if part is not None:
            there[part] = process
    return there


def part_of(name: str, command: list[str]) -> Part | None:
    """The part that a command line is of; None where it is no part."""
    module = _module(command)
    for part, ours in _OURS.items():
        if module == ours:
            return part
    if module == _CLIENT_SERVER:
        return Part.client_server
    for part, named in _NAMES.items():
        if name == named:
            return part
    for part, program in _PROGRAMS.items():
        if any(word.endswith(program) for word in command[:4]):
            return part
    # Its workers, and Serve's own HAProxy, are not told to be a master.
    return Part.haproxy if name == "haproxy" and "-W" in command else None


def state_of(process: psutil.Process | None) -> State:
    """How a part is whose process was found, or was not, as far as the kernel says it."""
    try:
        if process is None or not process.is_running():
            return State.dead
        status = process.status()
    except psutil.NoSuchProcess:
        return State.dead
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return State.dead
    return State.stopped if status == psutil.STATUS_STOPPED else State.running


def probed(part: Part, state: State, record: ClusterRecord) -> State:
    """The same, and whether a part that runs answers, where it can be asked."""
    probe = _PROBES.get(part)
    return State.silent if state is State.running and probe is not None and not probe(record) else state


def _module(command: list[str]) -> str:
    """What `python -m` runs."""
    return command[command.index("-m") + 1] if "-m" in command[1:4] and len(command) > 2 else ""


def _age(process: psutil.Process) -> float:
    try:
        return float(process.create_time())
    except psutil.NoSuchProcess:
        return 0.0


_PROBES: dict[Part, Callable[[ClusterRecord], bool]] = {
    Part.broker: lambda record: broker_answers(Path(record.key_socket)),
    Part.gcs: lambda record: processes.answers(record.ports["gcs"]),
    Part.haproxy: lambda record: processes.answers(record.ports["edge"]),
}
