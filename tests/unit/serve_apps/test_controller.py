"""The edge's controller over a real ledger and a real HAProxy: what happens when something around it fails."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import (
    AliasMoved,
    EdgeLimitSet,
    LedgerEvent,
    ModelDeployed,
    RolloutRolledBack,
    RolloutStarted,
    RolloutWeightChanged,
    StrangersRefused,
)
from cluster.security.identity import AUDIENCE, ISSUER, ensure_issuer, local_keys
from cluster.security.issuer import rotate_issuer
from cluster.security.tls import ensure_tls
from cluster.security.tokens import TokenRules
from cluster.settings import PlatformConfig, StorageConfig
from cluster.storage import Layout
from serve_apps.edge import strangers
from serve_apps.edge.config import EdgeSettings
from serve_apps.edge.controller import Controller
from serve_apps.edge.dashboard import TOKEN_VARIABLE
from serve_apps.edge.haproxy import HAProxy
from serve_apps.edge.keys import written_keys
from serve_apps.edge.limiting import Limited, Limits
from serve_apps.edge.state import EdgeState
from serve_apps.edge.targets import Targets
from tests.ports import free_port

ONE, TWO = "127.0.0.1:9", "127.0.0.1:10"
CHAMPION_ONLY = "m-v1|m-v1|champion|none|-|0|10000"
SPLIT = "m-v1|m-v2|challenger|r|s|2000|8000"
STARTED = RolloutStarted(
    model="m",
    rollout="r",
    salt="s",
    treatment_version=2,
    treatment_variant="challenger",
    champion_version=1,
    weight=20,
)
ROLLED_BACK = RolloutRolledBack(model="m", rollout="r", reason="worse")


class Serve:
    """What the controller hears of Serve: targets, an error, or nothing for a while. Our own fake."""

    def __init__(self) -> None:
        self.targets: Targets = {"m-v1": (ONE,), "m-v2": (TWO,), "outcomes": (ONE,)}
        self.error: Exception | None = None
        self.asked = 0
        self.answering = threading.Event()
        self.answering.set()

    def __call__(self) -> Targets:
        self.asked += 1
        self.answering.wait(20)
        if self.error is not None:
            raise self.error
        return self.targets


class Held(HAProxy):
    """Loads when it may."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.may_load, self.loading = threading.Event(), threading.Event()
        self.may_load.set()

    def load(self, text: str) -> None:
        self.loading.set()
        assert self.may_load.wait(20)
        super().load(text)


class Running:
    """A controller in a thread, and a look at what HAProxy has."""

    def __init__(self, root: Path, short: Path, *, ledger: Ledger | None = None) -> None:
        self.places = places = Layout(str(root))
        ensure_issuer(places)
        ensure_tls(places)
        self.settings = EdgeSettings(
            bind=f"127.0.0.1:{free_port()}",
            metrics_bind=f"127.0.0.1:{free_port()}",
            certificate=f"{places.tls}/edge.pem",
            dashboard="127.0.0.1:9",
            tokens=TokenRules(issuer=ISSUER, audience=AUDIENCE),
            map_file=str(root / "routes.map"),
            error_folder=str(root / "errors"),
            admin_socket=str(short / "admin.sock"),
            limits=Limits(folder=str(root), socket=str(short / "peers.sock")),
            max_body_bytes=100_000,
        )
        self.ledger = ledger or open_ledger(PlatformConfig(storage=StorageConfig(root=str(root))))
        self.serve = Serve()
        self.state_file = root / "state.json"
        self.haproxy_file = root / "haproxy.cfg"
        self.begin()

    def tell(self, *events: LedgerEvent) -> int:
        return [self.ledger.append(event, actor="test").seq for event in events][-1]

    @property
    def state(self) -> EdgeState | None:
        return EdgeState(**json.loads(self.state_file.read_text())) if self.state_file.exists() else None

    @property
    def applied(self) -> int:
        return self.state.applied_seq if self.state else 0

    def split(self) -> str:
        """The model's entry in the running HAProxy."""
        return entry_of(self.ask(f"show map {self.settings.map_file}"))

    def ask(self, command: str, address: str | None = None) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address or self.settings.admin_socket)
            connection.sendall(command.encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode()

    def begin(self, *, fetch_targets: Callable[[], Targets] | None = None) -> None:
        """A controller and a HAProxy of it, over what earlier ones have left."""
        self.haproxy = Held(
            config=self.haproxy_file,
            admin_socket=Path(self.settings.admin_socket),
            access_folder=self.haproxy_file.with_name("access"),
            secrets={TOKEN_VARIABLE: "of-ray"},
        )
        self.controller = Controller(
            ledger=self.ledger,
            fetch_targets=fetch_targets or self.serve,
            fetch_keys=written_keys(local_keys(self.places), self.haproxy_file.with_name("keys")),
            haproxy=self.haproxy,
            settings=self.settings,
            state_file=self.state_file,
        )
        self.stopped, self.handed_over = threading.Event(), threading.Event()
        self.thread = threading.Thread(
            target=self.controller.run, args=(self.stopped,), kwargs={"handed_over": self.handed_over}
        )

    def hand_over(self) -> None:
        self.handed_over.set()
        self.stopped.set()
        self.thread.join(20)

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=f"{self.places.tls}/ca.pem")
        host, port = self.settings.bind.split(":")
        return http.client.HTTPSConnection(host, int(port), context=context, timeout=10)

    def ask_all(self, command: str) -> list[str]:
        """What all workers say, those included that drain; there are two masters at least."""
        said = []
        masters = sorted(Path(self.settings.admin_socket).parent.glob("master-*.sock"))
        assert len(masters) > 1
        for master in masters:
            rows = [row.split() for row in self.ask("show proc", str(master)).splitlines()]
            for worker in (row[0] for row in rows if len(row) > 1 and row[1] == "worker"):
                with contextlib.suppress(ConnectionError):  # it has just ended
                    said.append(self.ask(f"@!{worker} {command}", str(master)))
        return said

    def close(self) -> None:
        self.serve.answering.set()
        self.haproxy.may_load.set()
        self.stopped.set()
        self.thread.join(20)
        self.ledger.close()


def entry_of(shown: str) -> str:
    """The model's entry in what `show map` says."""
    return next((line.split(" ")[2] for line in shown.splitlines() if " m " in line), "")


def wait_until(said: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.02)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    short = Path("/tmp") / f"falaj-controller-{random.randrange(10**9)}"
    short.mkdir(mode=0o700)
    one = Running(tmp_path, short)
    seq = one.tell(
        ModelDeployed(name="m", version=1, variant="champion", app="m-v1", route_prefix="/m-v1"),
        AliasMoved(name="m", alias="champion", version=1, previous=None, reason="first"),
        ModelDeployed(name="m", version=2, variant="challenger", app="m-v2", route_prefix="/m-v2"),
        STARTED,
    )
    one.thread.start()
    wait_until(lambda: one.state is not None and one.state.applied_seq == seq)
    yield one
    one.close()
    shutil.rmtree(short)


def test_the_state_says_what_haproxy_has(running: Running) -> None:
    """Whoever waited for an application in the state can rely on it at once."""
    assert running.split() == SPLIT
    running.serve.targets = {**running.serve.targets, "m-v3": (ONE,)}
    wait_until(lambda: running.state is not None and "m-v3" in running.state.backends)
    assert "m-v3" in running.ask("show backend")


def test_a_rollback_does_not_wait_for_serve(running: Running) -> None:
    """While the dashboard hangs, the split still follows the ledger."""
    running.serve.answering.clear()
    asked = running.serve.asked
    wait_until(lambda: running.serve.asked > asked)
    seq = running.tell(ROLLED_BACK)
    wait_until(lambda: running.state is not None and running.state.applied_seq == seq, seconds=5)
    assert running.split() == CHAMPION_ONLY


def test_a_rollback_does_not_wait_for_a_reload(running: Running) -> None:
    """The worker that serves hears of it at once, and the one that comes after it, too."""
    running.haproxy.may_load.clear()
    running.haproxy.loading.clear()
    running.serve.targets = {**running.serve.targets, "m-v3": (ONE,)}
    assert running.haproxy.loading.wait(10)
    seq = running.tell(ROLLED_BACK)
    wait_until(lambda: running.state is not None and running.state.applied_seq == seq, seconds=5)
    assert running.split() == CHAMPION_ONLY
    assert "m-v3" not in running.ask("show backend")
    running.haproxy.may_load.set()
    wait_until(lambda: running.state is not None and "m-v3" in running.state.backends)
    assert running.split() == CHAMPION_ONLY


def test_two_edges_follow_one_ledger(running: Running, tmp_path: Path) -> None:
    """Each on a node of its own; both have a weight soon after its event."""
    with another(tmp_path / "other", running.ledger) as other:
        for weight, bounds in ((5, "500|9500"), (50, "5000|5000")):
            seq = running.tell(RolloutWeightChanged(model="m", rollout="r", weight=weight))
            for edge in (running, other):
                wait_until(lambda one=edge, told=seq: one.applied == told, seconds=5)  # type: ignore[misc]
                assert edge.split() == f"m-v1|m-v2|challenger|r|s|{bounds}"


@contextlib.contextmanager
def another(root: Path, ledger: Ledger) -> Iterator[Running]:
    """A second edge over the first one's ledger."""
    short = Path("/tmp") / f"falaj-controller-{random.randrange(10**9)}"
    short.mkdir(mode=0o700)
    root.mkdir()
    one = Running(root, short, ledger=ledger)
    one.thread.start()
    wait_until(lambda: one.state is not None)
    yield one
    one.close()
    shutil.rmtree(short)


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("no JSON"), http.client.IncompleteRead(b"")])
def test_without_serve_the_last_replicas_stay(running: Running, error: Exception) -> None:
    """And a later answer counts again."""
    running.serve.error = error
    asked = running.serve.asked
    wait_until(lambda: running.serve.asked > asked + 1)
    assert "m-v2" in running.ask("show backend")
    running.serve.error, running.serve.targets = None, {"m-v1": (ONE,)}
    wait_until(lambda: running.state is not None and running.state.backends == ["m-v1"])


def test_a_refused_configuration_holds_up_no_rollback(running: Running) -> None:
    """An address HAProxy cannot take keeps the old replicas; the split moves on."""
    running.serve.targets = {"m-v1": ("no address",)}
    asked = running.serve.asked
    wait_until(lambda: running.serve.asked > asked + 1)
    seq = running.tell(ROLLED_BACK)
    wait_until(lambda: running.state is not None and running.state.applied_seq == seq)
    assert running.split() == CHAMPION_ONLY
    assert "m-v2" in running.ask("show backend")
    running.serve.targets = {"m-v1": (TWO,)}
    wait_until(lambda: running.state is not None and running.state.backends == ["m-v1"])


def test_a_map_that_cannot_be_written_is_tried_again(running: Running) -> None:
    """A rollback takes effect all the same, and nothing is claimed that a reload could undo."""
    file = Path(running.settings.map_file)
    file.unlink()
    file.mkdir()
    before = running.state
    seq = running.tell(ROLLED_BACK)
    asked = running.serve.asked
    wait_until(lambda: running.serve.asked > asked + 1)
    assert running.state == before
    assert running.split() == CHAMPION_ONLY
    file.rmdir()
    wait_until(lambda: running.state is not None and running.state.applied_seq == seq)
    assert (running.split(), file.read_text()) == (CHAMPION_ONLY, f"m {CHAMPION_ONLY}\n")


def test_a_killed_haproxy_comes_back_as_it_was(running: Running) -> None:
    """With the split of the last change, which only a `set map` had told it."""
    seq = running.tell(ROLLED_BACK)
    wait_until(lambda: running.state is not None and running.state.applied_seq == seq)
    before = running.haproxy.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: running.state is not None and running.state.pid not in (before, None))
    assert running.split() == CHAMPION_ONLY


def test_a_limit_reaches_the_edge_and_leaves_it_again(running: Running) -> None:
    """Of one principal, as the ledger says; the file has it too, so that a reload keeps it."""
    file = running.settings.limits.file(Limited.principal)

    def told(rate: int | None) -> str:
        event = EdgeLimitSet(limited="principal", name="alice b", requests_per_s=rate, concurrent=None)
        seq = running.tell(event)
        wait_until(lambda: running.state is not None and running.state.applied_seq == seq)
        return running.ask(f"show map {file}").strip()

    assert told(5).endswith("alice%20b 5|512")
    assert told(6).endswith("alice%20b 6|512")
    assert file.read_text() == "alice%20b 6|512\n"
    assert told(None) == file.read_text() == ""


def test_the_ledger_hears_how_many_strangers_there_were(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then, in one event for all of a kind."""
    for _ in range(3):
        connection = running.connect()
        connection.request("POST", "/v1/models/m:predict", b"{}")
        assert connection.getresponse().status == 401
        connection.close()
    monkeypatch.setattr(strangers, "EVERY_S", 0.0)
    wait_until(lambda: any(running.ledger.entries(StrangersRefused)))
    (entry,) = running.ledger.entries(StrangersRefused)
    assert (entry.actor, entry.payload["count"]) == ("system:edge", 3)


@contextlib.contextmanager
def asking(running: Running) -> Iterator[list[int]]:
    """Requests without a pause, each on a connection of its own; the list has their statuses."""
    statuses: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            connection = running.connect()
            try:
                connection.request("GET", "/v2/health/live")
                statuses.append(connection.getresponse().status)
            except OSError:
                statuses.append(0)
            connection.close()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        wait_until(lambda: len(statuses) > 5)
        yield statuses
        more = len(statuses) + 5
        wait_until(lambda: len(statuses) > more)
    finally:
        ended.set()
        thread.join(20)


def test_a_second_controller_takes_over_without_a_refused_request(running: Running) -> None:
    """HAProxy serves on when the first one has handed over, and gives its sockets to the second one's."""
    before = running.haproxy.pid
    kept = running.connect()
    kept.request("GET", "/v2/health/live")
    kept.getresponse().read()
    with asking(running) as statuses:
        running.hand_over()
        assert running.ask("show info")
        seq = running.tell(ROLLED_BACK)
        running.begin()
        running.thread.start()
        wait_until(lambda: running.applied == seq)
        assert running.haproxy.pid not in (before, None)
        assert running.split() == CHAMPION_ONLY
    assert set(statuses) == {200}
    # The kept connection is still the old worker's, which hears of changes until it ends.
    seq = running.tell(AliasMoved(name="m", alias="champion", version=2, previous=1, reason="better"))
    wait_until(lambda: running.applied == seq)
    assert {entry_of(said) for said in running.ask_all(f"show map {running.settings.map_file}")} == {
        "m-v2|m-v2|champion|none|-|0|10000"
    }
    kept.request("GET", "/v2/health/live")
    assert kept.getresponse().status == 200
    kept.close()
    assert before is not None
    wait_until(lambda: not alive(before))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def serves(running: Running, split: str) -> bool:
    """Whether HAProxy is there already, with a split."""
    try:
        return running.split() == split
    except OSError:
        return False


@pytest.mark.parametrize("lost", ["Serve", "Serve and ledger"])
def test_an_edge_that_starts_without_its_control_plane_serves_as_it_last_did(
    running: Running, lost: str
) -> None:
    """With the replicas, the split and the keys of before, though HAProxy had been killed, too."""

    def gone() -> Targets:
        raise OSError("gone")

    wait_until(lambda: running.state_file.with_name("last.json").exists())
    running.stopped.set()
    running.thread.join(20)
    rename = "ALTER TABLE {} RENAME TO {}"
    if "ledger" in lost:
        with running.ledger.engine.begin() as connection:
            connection.exec_driver_sql(rename.format("events", "elsewhere"))
    running.begin(fetch_targets=gone)
    running.thread.start()
    wait_until(lambda: serves(running, SPLIT))
    assert "m-v2" in running.ask("show backend")
    (key,) = local_keys(running.places).all()
    assert key in running.haproxy_file.read_text()
    if "ledger" in lost:
        with running.ledger.engine.begin() as connection:
            connection.exec_driver_sql(rename.format("elsewhere", "events"))
    seq = running.tell(ROLLED_BACK)
    wait_until(lambda: running.applied == seq)
    assert running.split() == CHAMPION_ONLY
    assert "m-v2" in running.ask("show backend")


def test_a_new_certificate_is_shown_without_a_refused_request(running: Running) -> None:
    """As soon as its file is there; what is none stays unused, and holds up no new replicas."""
    file = Path(running.settings.certificate)

    def shown() -> bytes | None:
        connection = running.connect()
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)
        certificate = connection.sock.getpeercert(binary_form=True)
        connection.close()
        return certificate

    before, content = shown(), file.read_bytes()
    with asking(running) as statuses:
        file.write_bytes(b"no certificate")
        running.serve.targets = {**running.serve.targets, "m-v3": (ONE,)}
        wait_until(lambda: running.state is not None and "m-v3" in running.state.backends)
        assert shown() == before
        file.unlink()
        ensure_tls(running.places)
        assert file.read_bytes() != content
        wait_until(lambda: shown() != before)
    assert set(statuses) == {200}
    copies = running.state_file.with_name("certificates")
    wait_until(lambda: [copy.read_bytes() for copy in copies.iterdir()] == [file.read_bytes()])
    assert {copy.stat().st_mode & 0o777 for copy in copies.iterdir()} == {0o600}


def test_a_rotated_key_reaches_the_edge_by_itself(running: Running) -> None:
    """The old one stays while its tokens hold, and goes when they must not any more."""
    config = running.haproxy_file
    (old,) = local_keys(running.places).all()
    new = rotate_issuer(running.places)
    wait_until(lambda: new in config.read_text())
    assert old in config.read_text()
    after_theft = rotate_issuer(running.places, keep_s=0)
    wait_until(lambda: after_theft in config.read_text())
    assert not {old, new} & set(config.read_text().split())
    Path(running.places.keys, "jwks.json").unlink()
    wait_until(lambda: after_theft not in config.read_text())


def test_an_edge_that_cannot_start_says_so(tmp_path: Path) -> None:
    """The first configuration has to load; there is no last good state yet."""
    short = Path("/tmp") / f"falaj-controller-{random.randrange(10**9)}"
    short.mkdir(mode=0o700)
    one = Running(tmp_path, short)
    Path(one.settings.certificate).unlink()
    with pytest.raises(Exception, match="HAProxy refuses"):
        one.controller.run(one.stopped)
    one.ledger.close()
    shutil.rmtree(short)
