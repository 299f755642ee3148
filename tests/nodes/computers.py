"""Computers for tests: each has its own network, process ids, mounts and folder, and runs a node of one cluster.

A computer is a network namespace (`namespaces`) with a PID namespace and a mount namespace. So the processes of one
node do not see those of another, as on real machines. The test's own process sees all of them.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.host import processes
from cluster.session import ClusterRecord, find_own_record
from cluster.settings import StorageConfig
from tests.nodes.namespaces import Machine
from tests.processes.commands import run_process

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True)
class Computer:
    """A machine that can be switched on and off. `running` switches it on."""

    name: str
    machine: Machine
    root: Path
    env: dict[str, str]
    init: psutil.Process = field(init=False)
    """First process of the PID namespace."""
    _held: subprocess.Popen[str] = field(init=False)

    @property
    def address(self) -> str:
        return self.machine.address

    @property
    def storage_root(self) -> Path:
        return self.root / ".falaj"

    @property
    def record(self) -> ClusterRecord:
        record = find_own_record(StorageConfig(root=str(self.storage_root)))
        assert record is not None, f"no cluster is recorded on {self.name}"
        return record

    def switch_on(self) -> None:
        """Create the namespaces and their first process."""
        separate = ("unshare", "--mount", "--pid", "--fork", "--mount-proc")
        self._held = subprocess.Popen(
            self.machine.command(*separate, sys.executable, "-m", "tests.nodes.init_process"),
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._held.stdout is not None
        assert self._held.stdout.readline() == "ready\n", f"{self.name} cannot be switched on"
        [self.init] = psutil.Process(self._held.pid).children()

    def switch_off(self) -> None:
        """Kill all processes at once. Disk and network cable stay."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.init.kill()
        with self._held:  # waits until it has ended, and closes the pipes
            pass

    def command(self, *command: str) -> list[str]:
        """Return a command line that runs a command on this computer, in its folder."""
        enter = ("nsenter", f"--target={self.init.pid}", "--net", "--mount", "--pid")
        return [*enter, "--", "env", f"--chdir={self.root}", *command]

    def run(self, module: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `python -m module args` on this computer."""
        return run_process(self.command(sys.executable, "-m", module, *args), env=self.env, check=check)

    def members(self) -> list[psutil.Process]:
        """Return all processes of the computer but its first one, and but those that have ended."""
        namespace = Path(f"/proc/{self.init.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if (
                    process.pid != self.init.pid
                    and process.status() != psutil.STATUS_ZOMBIE
                    and Path(f"/proc/{process.pid}/ns/pid").readlink() == namespace
                ):
                    found.append(process)
        return found

    def titled(self, title: str) -> list[psutil.Process]:
        """Return the computer's processes whose name or command line contains a text."""
        found = []
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in process.name() or title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the computer.

        `nsenter`, which started some of them from outside, stops itself with them, so it gets the signal too.
        """
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                parent = process.parent()
                if parent is not None and parent.name() == "nsenter":
                    parent.send_signal(number)

    def kill_all(self) -> None:
        """Kill all processes of the node with SIGKILL, and also those that a supervisor starts meanwhile."""
        while members := self.members():
            for process in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(members, timeout=10)


@contextlib.contextmanager
def running(computers: list[Computer]) -> Iterator[None]:
    """Switch computers on; at the end, end all their processes."""
    with contextlib.ExitStack() as stack:
        for computer in computers:
            computer.switch_on()
            stack.callback(computer.switch_off)
        yield


def end_clusters(computers: list[Computer], *options: str) -> None:
    """Run `cluster.down` on each computer, nodes first, and check that nothing is left.

    Args:
        computers: the head first.
        options: options of the head's commands.
    """
    left = []
    for number, computer in reversed(list(enumerate(computers))):
        if (computer.storage_root / "cluster.json").exists():
            instance = computer.record.instance
            computer.run("cluster.down", *(() if number else options), check=False)
            left += processes.find(instance)
            processes.end(instance)
    assert left == []
