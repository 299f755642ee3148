"""Tests of a running edge that take seconds.

They use a real HAProxy, and replicas that are killed or stopped, without Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.host import processes
from cluster.security.tls.certificates import ensure_tls
from cluster.security.tokens.issuer import ensure_issuer
from cluster.session import write_record
from cluster.settings import StorageConfig
from cluster.storage import Layout
from tests.servers.edge import Edge, running_edge, treated_unit
from tests.servers.polling import wait_until
from tests.servers.ports import free_port
from tests.servers.replica import listener, record

REPLICA = """
import sys
from tests.servers.edge import Mirror
Mirror(port=int(sys.argv[1])).serve_forever()
"""


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge")) as running:
        yield running


def counted(edge: Edge, subject: str) -> int:
    """Return how many requests of a principal the running HAProxy has let through."""
    said = edge.ask("show table principals_counted").splitlines()
    line = next((line for line in said if f"key={subject} " in line), "gpc0=0")
    return int(line.split("gpc0=")[1].split()[0])


def test_what_principals_have_asked_survives_a_reload(edge: Edge) -> None:
    """Request counts of principals survive a reload of HAProxy.

    The old worker sends its counts to the new one. It does so once it has run for ten seconds, or has itself
    received counts.
    """
    wait_until(lambda: int(edge.ask("show peers").split("flags=")[1].split()[0], 16) & 3 == 3, seconds=30)
    for number in range(1, 4):
        assert edge.call(token=edge.token(subject="gina"))[0] == 200
        edge.load_targets()
        wait_until(lambda told=number: counted(edge, "gina") == told, seconds=30)  # type: ignore[misc]


@contextlib.contextmanager
def replica(port: int) -> Iterator[int]:
    """Run a replica as a separate process, and yield its pid."""
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", REPLICA, str(port)], cwd=root) as process:
        try:
            yield process.pid
        finally:
            process.kill()


@dataclass(frozen=True)
class Answer:
    """The answer to one request. Times are in monotonic seconds."""

    asked_at: float
    at: float
    status: int
    variant: str


def ask(edge: Edge, token: str) -> Answer:
    began = time.monotonic()
    status, heard = edge.call(token=token, headers={"X-Unit-ID": treated_unit()})
    return Answer(began, time.monotonic(), status, heard.get("x-falaj-variant", ""))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_treatments_share_goes_to_the_champion_within_a_second(
    edge: Edge, number: signal.Signals
) -> None:
    """The champion takes over the requests of a killed or hanging treatment within a second.

    Every request gets an answer, including those that had reached the lost replica.
    """
    port, token = free_port(), edge.token()
    with replica(port) as pid, ThreadPoolExecutor(300) as pool:
        edge.load_targets(edge.targets | {"m-v2": (f"127.0.0.1:{port}",)})
        wait_until(lambda: ask(edge, token).variant == "challenger", seconds=30)
        asked = []
        for turn in range(250):
            if turn == 50:
                os.kill(pid, number)
                lost_at = time.monotonic()
            asked.append(pool.submit(ask, edge, token))
            threading.Event().wait(0.01)
        answers = [future.result() for future in asked]
    assert {answer.status for answer in answers} == {200}
    late = [answer for answer in answers if answer.asked_at > lost_at + 1]
    assert {answer.variant for answer in late} == {"champion"}
    waited = [answer.asked_at - lost_at for answer in answers if answer.at - answer.asked_at > 1.5]
    slowest = max(answer.at - answer.asked_at for answer in answers)
    print(
        f"{number.name}: {len(waited)} waited, the last one asked after {max(waited, default=0):.2f} s; "
        f"the slowest answer took {slowest:.2f} s"
    )


@dataclass
class Command:
    """`python -m serve_apps.edge` for a cluster whose Ray does not answer."""

    root: Path
    port: int

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command, and return when its pid is in the lock file and HAProxy answers."""
        lock = self.root / "edge" / "controller.lock"
        command = [sys.executable, "-m", "serve_apps.edge", f"storage.root={self.root}"]
        process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2])
        wait_until(lambda: lock.exists() and lock.read_text().strip() == str(process.pid), seconds=30)
        wait_until(lambda: self.haproxy(process) is not None, seconds=30)
        return process

    def haproxy(self, process: subprocess.Popen[bytes]) -> psutil.Process | None:
        """Return HAProxy's master process if HAProxy answers, else `None`."""
        children = psutil.Process(process.pid).children()
        masters = [child for child in children if "-W" in child.cmdline()]
        return masters[0] if masters and self.lives() else None

    def lives(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.root / "tls" / "ca.pem"))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=10)
        try:
            connection.request("GET", "/v2/health/live")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    port, metrics = free_port(), free_port()
    places = Layout(str(tmp_path))
    ensure_issuer(places)
    ensure_tls(places)
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    (tmp_path / "edge").mkdir()
    (tmp_path / "token").write_text("of-ray")
    with listener() as ray_port:
        known = dataclasses.replace(
            record(tmp_path, "", ray_port),
            cluster_id=f"test-{port}",
            ports={"edge": port, "edge_metrics": metrics},
            dashboard_url="http://127.0.0.1:9",
            token_path=str(tmp_path / "token"),
            temp_dir=str(short),
        )
        write_record(known, StorageConfig(root=str(tmp_path)))
        yield Command(tmp_path, port)
        processes.end(known.cluster_id)
    shutil.rmtree(short)


def test_an_edge_is_restarted_killed_and_ended(command: Command) -> None:
    """Starting the edge again replaces the first controller, and no request fails.

    If a controller is killed, HAProxy continues, and the next controller takes it over. SIGTERM ends both.
    """
    first = command.start()
    lived: list[bool] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            lived.append(command.lives())

    asking = threading.Thread(target=ask)
    asking.start()
    second = command.start()
    assert first.wait(20) == 0
    second.kill()
    second.wait(20)
    number = len(lived)
    wait_until(lambda: len(lived) > number + 10, seconds=30)
    third = command.start()
    master = command.haproxy(third)
    ended.set()
    asking.join(20)
    assert lived.count(False) == 0, f"of {len(lived)}"
    assert master is not None
    third.terminate()
    assert third.wait(20) == 0
    assert not psutil.pid_exists(master.pid) or master.status() == psutil.STATUS_ZOMBIE
    assert not command.lives()
