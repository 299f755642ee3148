"""Tests of the edge alone, whose replicas are on other machines that are cut off or stopped. No Ray runs.

The replicas are echo servers with TLS, in network namespaces.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.security.tls.certificates import ensure_tls
from tests.clients.balanced_load import BalancedLoad, Kind, Sent
from tests.nodes.namespaces import Machine, network
from tests.servers.edge import PREDICT, Edge, running_edge
from tests.servers.polling import wait_until

PORT, PER_S = 30_000, 40.0
NUM_SERVERS = 8  # two versions, each with a backend for treated requests, on two machines
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """An edge, and replicas of both versions on two other machines."""

    edge: Edge
    machines: list[Machine]
    processes: list[subprocess.Popen[bytes]]

    def load(self) -> BalancedLoad:
        """Return a load of both arms of the rollout."""
        token = self.edge.token()
        return BalancedLoad(
            servers={"edge": self.edge.url},
            health_path="/v2/health/ready",
            kinds={"predict": Kind(path=PREDICT, per_s=PER_S, body=lambda number: {"number": number})},
            headers=lambda number: {"Authorization": f"Bearer {token}", "X-Unit-ID": str(number)},
            authority=self.edge.ca_file,
        )


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Replicas]:
    with contextlib.ExitStack() as stack:
        machines = list(stack.enter_context(network("second", "third")).machines.values())
        edge = stack.enter_context(running_edge(tmp_path))
        ensure_tls(edge.places, addresses=[machine.address for machine in machines])
        processes = []
        for machine in machines:
            command = (sys.executable, "-m", "tests.processes.echo_process")
            arguments = (machine.address, str(PORT), edge.places.tls)
            process = subprocess.Popen(machine.command(*command, *arguments), cwd=REPOSITORY)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        addresses = tuple(f"{machine.address}:{PORT}" for machine in machines)
        edge.load_targets({"m-v1": addresses, "m-v2": addresses})
        wait_until(lambda: num_up(edge) == NUM_SERVERS, "all replicas", seconds=30)
        yield Replicas(edge=edge, machines=machines, processes=processes)


def num_up(edge: Edge) -> int:
    """Return the number of HAProxy's servers on other machines that are up."""
    rows = [line.split(",") for line in edge.ask("show stat").splitlines()]
    return sum(row[1].endswith(f"_{PORT}") and row[17] == "UP" for row in rows if len(row) > 17)


def failed(sent: list[Sent]) -> list[tuple[float, float, int, object]]:
    return [(one.at, one.took_s, one.status, one.content) for one in sent if not one.is_good]


def summary(sent: list[Sent]) -> str:
    longest_s = max(one.took_s for one in sent)
    return f"{len(sent)} requests, {len(failed(sent))} failed, longest {longest_s:.1f} s"


def test_cut_machine_costs_no_request(replicas: Replicas) -> None:
    """Requests that were in its replicas are sent to the other machine within seconds."""
    with replicas.load() as load:
        time.sleep(2)
        at = time.monotonic()
        replicas.machines[1].disconnect()
        time.sleep(8)
        replicas.machines[1].connect()
        time.sleep(2)
    print(summary(load.sent))
    assert failed(load.sent) == []
    assert max(one.took_s for one in load.sent) < 8
    assert max(one.took_s for one in load.sent if one.at > at + 3) < 2


def test_stopped_machine_gets_no_more_requests(replicas: Replicas) -> None:
    """Its kernel still accepts requests. Only those of the first seconds wait for it."""
    with replicas.load() as load:
        time.sleep(2)
        at = time.monotonic()
        replicas.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(8)
        replicas.processes[1].send_signal(signal.SIGCONT)
        time.sleep(2)
    print(summary(load.sent))
    assert [one for one in failed(load.sent) if one[0] > at + 3] == []
    assert max(one.took_s for one in load.sent if one.at > at + 3) < 2
