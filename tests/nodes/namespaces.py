"""Machines for tests: network namespaces of Linux, joined by a bridge.

Processes in a namespace have their own loopback and one address on the bridge. Files and process ids are shared. The
test's own process is a machine too, at the bridge's address: databases that all nodes use can listen there.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A network namespace."""

    namespace: str
    address: str
    link: str
    """The end of its cable on the bridge."""

    def command(self, *command: str) -> list[str]:
        """Return a command line that runs a command on this machine."""
        return [_ip(), "netns", "exec", self.namespace, *command]

    def disconnect(self) -> None:
        """Cut the cable. Nothing answers any more, and no connection is closed."""
        _run("link", "set", self.link, "down")

    def connect(self) -> None:
        """Join the cable again."""
        _run("link", "set", self.link, "up")


@dataclass(frozen=True, kw_only=True)
class Network:
    """Machines on one bridge."""

    address: str
    """Address of the test's own process."""
    subnet: str
    machines: dict[str, Machine]


@contextlib.contextmanager
def network(*names: str) -> Iterator[Network]:
    """Create machines with these names, and remove them at the end.

    The test is skipped where namespaces are not permitted.
    """
    reason = _why_not()
    if reason:
        pytest.skip(f"SKIPPED LOUDLY: {reason}; nothing was tested on several machines")
    tag, third = f"{os.getpid() % 0xFFFFF:05x}", random.randrange(1, 255)
    second = random.randrange(64, 128)
    bridge, prefix = f"fj{tag}", f"10.{second}.{third}"
    machines = {
        name: Machine(namespace=f"falaj-{tag}-{name}", address=f"{prefix}.{number}", link=f"fj{tag}{number}")
        for number, name in enumerate(names, start=2)
    }
    with contextlib.ExitStack() as stack:
        stack.callback(_run, "link", "delete", bridge, check=False)
        _run("link", "add", bridge, "type", "bridge")
        _run("address", "add", f"{prefix}.1/24", "dev", bridge)
        _run("link", "set", bridge, "up")
        for machine in machines.values():
            stack.callback(_run, "netns", "delete", machine.namespace, check=False)
            stack.callback(_run, "link", "delete", machine.link, check=False)
            _plug_in(machine, bridge)
        yield Network(address=f"{prefix}.1", subnet=f"{prefix}.0/24", machines=machines)


def _plug_in(machine: Machine, bridge: str) -> None:
    _run("netns", "add", machine.namespace)
    _run("link", "add", machine.link, "type", "veth", "peer", "name", "eth0", "netns", machine.namespace)
    _run("link", "set", machine.link, "master", bridge)
    _run("link", "set", machine.link, "up")
    inside = ("-n", machine.namespace)
    _run(*inside, "link", "set", "lo", "up")
    _run(*inside, "address", "add", f"{machine.address}/24", "dev", "eth0")
    _run(*inside, "link", "set", "eth0", "up")


def _why_not() -> str:
    """Return why this process cannot create namespaces, or "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path(_ip()).exists():
        return "the command `ip` is not installed (Debian: apt install iproute2)"
    probe = f"falaj-probe-{os.getpid()}"
    try:
        if _run("netns", "add", probe, check=False):
            return "network namespaces are not permitted here"
        if _run("link", "add", f"fjp{os.getpid() % 0xFFFFF:05x}", "type", "bridge", check=False):
            return "bridges are not permitted here"
    finally:
        _run("netns", "delete", probe, check=False)
        _run("link", "delete", f"fjp{os.getpid() % 0xFFFFF:05x}", check=False)
    return ""


def _ip() -> str:
    return shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "ip"


def _run(*arguments: str, check: bool = True) -> int:
    return subprocess.run([_ip(), *arguments], check=check, capture_output=True).returncode
