"""The parts of a cluster on this machine, and the state of each part.

A part is found by its command line among the cluster's processes, and never by a stored pid. Pids are reused, and an
operator may have started a part by hand.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.host import processes
from cluster.security.keys.client import is_broker_alive
from cluster.session import ClusterRecord


class Part(enum.StrEnum):
    """A process that a cluster needs. Replicas and Ray's workers are not parts, because Ray restarts them."""

    gcs = "Ray GCS"
    raylet = "raylet"
    dashboard = "Ray dashboard"
    monitor = "Ray autoscaler"
    log_monitor = "Ray log monitor"
    client_server = "Ray client server"
    broker = "key broker"
    nodes = "service for nodes"
    uploader = "log uploader"
    scheduler = "scheduler"
    jobs = "job service"
    rollouts = "rollout controller"
    edge = "edge controller"
    haproxy = "edge"
    supervisor = "supervisor"


class State(enum.StrEnum):
    """State of a part."""

    running = "running"
    stopped = "stopped"
    """The process exists, but it was stopped with SIGSTOP."""
    silent = "does not answer"
    dead = "dead"


BROKER, EDGE, SUPERVISOR = "cluster.security.keys", "serve_apps.edge", "cluster.supervisor"
NODES, RELAY = "cluster.membership", "cluster.membership.relay"
UPLOADER = "cluster.records.upload"
SCHEDULER, JOBS = "jobs.schedule.service", "jobs.submission.service"
ROLLOUTS = "serve_apps.rollout.controller.service"
_MODULES = {
    BROKER: Part.broker,
    RELAY: Part.broker,
    NODES: Part.nodes,
    UPLOADER: Part.uploader,
    SCHEDULER: Part.scheduler,
    JOBS: Part.jobs,
    ROLLOUTS: Part.rollouts,
    EDGE: Part.edge,
    SUPERVISOR: Part.supervisor,
}
_PROCESS_NAMES = {Part.gcs: "gcs_server", Part.raylet: "raylet"}
_SCRIPTS = {
    Part.dashboard: "/ray/dashboard/dashboard.py",
    Part.monitor: "/ray/autoscaler/_private/monitor.py",
    Part.log_monitor: "/ray/_private/log_monitor.py",
}
_CLIENT_SERVER = "ray.util.client.server"
RAY_PARTS = (Part.gcs, Part.raylet, Part.dashboard, Part.monitor, Part.log_monitor, Part.client_server)
"""Parts that `ray start` starts. Ray does not restart them."""
_JOINED_PARTS = (Part.raylet, Part.log_monitor, Part.broker, Part.uploader, Part.supervisor)
_EDGE_PARTS = (Part.edge, Part.haproxy, Part.rollouts)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartStatus:
    """State and process of one part."""

    part: Part
    state: State
    process: psutil.Process | None = None


def expected_parts(record: ClusterRecord) -> list[Part]:
    """Return the parts that this machine needs: the head has all, and a node that joined has a few.

    Logs are uploaded only if the storage root is remote. A service for nodes needs an address.
    """
    if record.node_id is not None:
        return [*_JOINED_PARTS, *(_EDGE_PARTS if record.has_edge else ())]
    left_out = {
        *(() if record.has_nodes else (Part.nodes,)),
        *(() if record.layout.shared is not None else (Part.uploader,)),
    }
    return [part for part in Part if part not in left_out]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeStatus:
    """State of another node."""

    node_id: str
    name: str
    address: str
    region: str
    state: State
    text: str
    """The state in words, with the parts that do not run."""


def inspect_parts(record: ClusterRecord) -> list[PartStatus]:
    """Return the current status of every part on this machine."""
    running = find_parts(record)
    return [
        PartStatus(
            part=part, state=probe_state(part, state_of(running.get(part)), record), process=running.get(part)
        )
        for part in expected_parts(record)
    ]


def states_by_name(parts: Iterable[PartStatus]) -> dict[str, str]:
    """Return the parts' states as plain text, for reports to the head."""
    return {status.part.value: status.state.value for status in parts}


def not_running(parts: Iterable[PartStatus]) -> list[PartStatus]:
    """Return the parts that do not run."""
    return [status for status in parts if status.state is not State.running]


def format_parts(parts: Iterable[PartStatus]) -> str:
    """Return the parts' names and states as text for a message."""
    return ", ".join(f"{status.part} ({status.state})" for status in parts)


def find_parts(record: ClusterRecord) -> dict[Part, psutil.Process]:
    """Return the processes of a cluster's parts."""
    return processes_by_part(processes.find(record.instance, owner=record.owner))


def processes_by_part(members: Iterable[psutil.Process]) -> dict[Part, psutil.Process]:
    """Return the process of each part among a cluster's processes.

    If a part has two processes, for example while the edge reloads, the newest process is returned.
    """
    by_part: dict[Part, psutil.Process] = {}
    for process in sorted(members, key=_created_at):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            part = part_of(process.name(), process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if part is not None:
            by_part[part] = process
    return by_part


def part_of(name: str, command: list[str]) -> Part | None:
    """Return the part to which a process with this name and command line belongs, or None."""
    module = _module(command)
    if module in _MODULES:
        return _MODULES[module]
    if module == _CLIENT_SERVER:
        return Part.client_server
    for part, process_name in _PROCESS_NAMES.items():
        if name == process_name:
            return part
    for part, script in _SCRIPTS.items():
        if any(argument.endswith(script) for argument in command[:4]):
            return part
    # Only the edge's master process has -W. HAProxy's workers and Ray Serve's own HAProxy do not.
    return Part.haproxy if name == "haproxy" and "-W" in command else None


def state_of(process: psutil.Process | None) -> State:
    """Return the state that the kernel reports for a part's process, or `dead` if `process` is None."""
    try:
        if process is None or not process.is_running():
            return State.dead
        status = process.status()
    except psutil.NoSuchProcess:
        return State.dead
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return State.dead
    return State.stopped if status == psutil.STATUS_STOPPED else State.running


def probe_state(part: Part, state: State, record: ClusterRecord) -> State:
    """Return `silent` if the part runs and does not answer its probe, and otherwise `state`.

    For a part without a probe, return `state`.
    """
    probe = _PROBES.get(part)
    return State.silent if state is State.running and probe is not None and not probe(record) else state


def _module(command: list[str]) -> str:
    """Return the module that `python -m` runs, or ""."""
    return command[command.index("-m") + 1] if "-m" in command[1:4] and len(command) > 2 else ""


def _created_at(process: psutil.Process) -> float:
    try:
        return float(process.create_time())
    except psutil.NoSuchProcess:
        return 0.0


_PROBES: dict[Part, Callable[[ClusterRecord], bool]] = {
    Part.broker: lambda record: is_broker_alive(Path(record.key_socket)),
    Part.nodes: lambda record: processes.port_answers(record.ports["nodes"], record.address),
    Part.gcs: lambda record: processes.port_answers(record.ports["gcs"], record.address),
    Part.haproxy: lambda record: processes.port_answers(record.ports["edge"]),
}
