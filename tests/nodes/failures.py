"""Failures of a cluster of three nodes, and how each is repaired.

A failure happens to a node, or to a server that all nodes use. Falaj and Ray Serve get the same failures. `System` has
what differs between them.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from tests.nodes.computers import Computer
from tests.nodes.three_nodes import ThreeNodes
from tests.servers.small_disk import fill_disk

VICTIM = "third"
"""The node that fails, if it is not the head."""
SERVER_DOWN_S = 3.0
"""How long a database is down: a supervisor of the operating system starts it again."""
NODE_DOWN_S = 30.0
"""How long a node is cut off, stopped, or without disk."""
HEAD_DOWN_S = 10.0
CLOCK_S = 600
FILLER = "filler"


class Server(Protocol):
    """A server that a test can kill and start again."""

    def kill(self) -> None: ...

    def start(self) -> None: ...


class System(Protocol):
    """A cluster of three nodes that serves requests."""

    cluster: ThreeNodes

    def entry(self, computer: Computer) -> list[psutil.Process]:
        """Return the processes of a node that take requests from clients."""

    def start_head(self) -> None:
        """Start a dead head, as an operator or a supervisor of the operating system does."""

    def start_node(self, computer: Computer) -> None:
        """Start a node again that has left."""

    def drain(self, computer: Computer) -> None:
        """Let a node finish its work, and take it out of the cluster."""

    def disk(self, computer: Computer) -> Path:
        """Return the folder of a node's own state."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure."""

    name: str
    text: str
    """The failure in words, for the report."""
    happen: Callable[[System], None]
    repair: Callable[[System], None] = lambda system: None
    repair_after_s: float = 0.0
    lost_edge: str | None = None
    """Name of the node whose edge clients cannot use meanwhile."""


def victim(system: System) -> Computer:
    return system.cluster.computers[VICTIM]


def kill(*processes: psutil.Process) -> None:
    """Send SIGKILL to processes."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_replica(system: System) -> None:
    kill(victim(system).titled("ServeReplica:")[0])


def kill_raylet(system: System) -> None:
    kill(*(one for one in victim(system).members() if one.name() == "raylet"))


def kill_head(system: System) -> None:
    system.cluster.head.kill_all()


def kill_edge(system: System) -> None:
    kill(*system.entry(victim(system)))


def fill(system: System) -> None:
    fill_disk(system.disk(victim(system)) / FILLER)


def free_disk(system: System) -> None:
    (system.disk(victim(system)) / FILLER).unlink()


def set_clock(seconds: int) -> Callable[[System], None]:
    return lambda system: move_clock(victim(system), seconds)


def move_clock(computer: Computer, seconds: int) -> None:
    """Move the wall clock of a computer that was prepared by `with_movable_clock`."""
    with clock_file(computer).open("r+b") as file:
        file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


def clock_file(computer: Computer) -> Path:
    """Return the file with the seconds by which a computer's clock is ahead."""
    return computer.root / "clock"


def with_movable_clock(computer: Computer) -> None:
    """Give later processes of a computer a wall clock that a test can move. Needs `cc`."""
    library = computer.root / "moved_clock.so"
    source = Path(__file__).with_name("moved_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    clock_file(computer).write_bytes(bytes(8))
    computer.env |= {"LD_PRELOAD": str(library), "MOVED_CLOCK": str(clock_file(computer))}


def killed_server(name: str, server: Callable[[ThreeNodes], Server]) -> Failure:
    """Return the failure of a server that all nodes use."""
    return Failure(
        name=name.lower(),
        text=f"kill -9 of {name}, started again after {SERVER_DOWN_S:.0f} s",
        happen=lambda system: server(system.cluster).kill(),
        repair=lambda system: server(system.cluster).start(),
        repair_after_s=SERVER_DOWN_S,
    )


FAILURES = (
    Failure(name="replica", text="kill -9 of a replica", happen=kill_replica),
    Failure(name="raylet", text="kill -9 of a node's raylet", happen=kill_raylet),
    Failure(name="edge", text="kill -9 of what takes requests on a node", happen=kill_edge),
    Failure(
        name="cut",
        text=f"network of a node cut for {NODE_DOWN_S:.0f} s",
        happen=lambda system: victim(system).machine.disconnect(),
        repair=lambda system: victim(system).machine.connect(),
        repair_after_s=NODE_DOWN_S,
        lost_edge=VICTIM,
    ),
    Failure(
        name="stopped",
        text=f"all processes of a node stopped for {NODE_DOWN_S:.0f} s (SIGSTOP)",
        happen=lambda system: victim(system).signal_all(signal.SIGSTOP),
        repair=lambda system: victim(system).signal_all(signal.SIGCONT),
        repair_after_s=NODE_DOWN_S,
        lost_edge=VICTIM,
    ),
    Failure(
        name="full_disk",
        text=f"full disk of a node for {NODE_DOWN_S:.0f} s",
        happen=fill,
        repair=free_disk,
        repair_after_s=NODE_DOWN_S,
    ),
    Failure(
        name="clock",
        text="clock of a node 10 minutes ahead",
        happen=set_clock(CLOCK_S),
        repair=set_clock(0),
        repair_after_s=NODE_DOWN_S,
    ),
    killed_server("Redis", lambda cluster: cluster.redis),
    killed_server("PostgreSQL", lambda cluster: cluster.database),
    Failure(
        name="drain",
        text="a node leaves",
        happen=lambda system: system.drain(victim(system)),
        repair=lambda system: system.start_node(victim(system)),
        lost_edge=VICTIM,
    ),
    Failure(
        name="head",
        text=f"kill -9 of all processes of the head, started again after {HEAD_DOWN_S:.0f} s",
        happen=kill_head,
        repair=lambda system: system.start_head(),
        repair_after_s=HEAD_DOWN_S,
        lost_edge="head",
    ),
)
"""All failures. The head's is the last, because it changes most."""
