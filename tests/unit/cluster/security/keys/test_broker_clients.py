"""The key broker's socket: permitted peers, restarts, and metrics."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.keys import client as client_module
from cluster.security.keys.broker import Broker, peer_allowed
from cluster.security.keys.client import BrokerKeyStore, is_broker_alive
from cluster.security.keys.gate import Denial
from cluster.security.keys.metrics import BrokerMetrics
from cluster.security.keys.store import KeyInfo, KeyNotFound, KeyStoreUnavailable
from tests.processes.other_user import NOBODY, needs_root, start_as_nobody
from tests.servers.key_broker_world import INFO, NAME, SECRET, Failing, World, answers, framed
from tests.servers.polling import wait_until


def test_client_survives_a_restart_of_the_broker(world: World) -> None:
    """The client reconnects without an error for its caller."""
    client = world.client()
    with world.serving():
        text = client.wrap(NAME, SECRET)
    with pytest.raises(KeyStoreUnavailable, match=str(world.path)):
        client.info(NAME)
    with world.serving():
        assert client.unwrap(NAME, text) == SECRET
    with world.serving():
        assert client.unwrap(NAME, text) == SECRET
        assert client.rotate(NAME) == 2


def test_token_is_not_sent_to_another_users_listener(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user may have bound the path first. A broker of root is accepted."""
    with world.serving():
        monkeypatch.setattr(client_module, "peer_uid", lambda connection: 4242)
        monkeypatch.setattr(client_module.os, "geteuid", lambda: 1000)
        expected = world.ring.names()
        with pytest.raises(KeyStoreUnavailable, match="belongs to user 4242"):
            world.client().names()
        monkeypatch.setattr(client_module, "peer_uid", lambda connection: 0)
        assert world.client().names() == expected


def test_token_of_root_is_sent_only_to_the_cluster_user_and_root(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may use a cluster of another user, as its record names it."""
    monkeypatch.setattr(client_module.os, "geteuid", lambda: 0)
    with world.serving():
        for peer, owner in ((1000, 1000), (4242, 1000), (4242, None), (0, 1000)):
            monkeypatch.setattr(client_module, "peer_uid", lambda connection, peer=peer: peer)
            client = BrokerKeyStore(world.path, lambda: "admin/all", owner=owner)
            if peer != 4242:
                assert client.names() == world.ring.names()
            else:
                with pytest.raises(KeyStoreUnavailable, match=r"user 4242.*no token was sent"):
                    client.names()


@needs_root
def test_real_socket_of_another_user_gets_no_token(tmp_path: Path) -> None:
    """The socket is in the place of the broker's. The client connects and sends nothing."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True); "
        "print(s.accept()[0].recv(9999), flush=True)"
    )
    with tempfile.TemporaryDirectory(prefix="fk-") as folder:
        os.chown(folder, NOBODY, NOBODY)
        path = Path(folder) / "broker.sock"
        with start_as_nobody(code, str(path)) as listener:
            assert listener.stdout is not None
            listener.stdout.readline()
            with pytest.raises(KeyStoreUnavailable, match=r"user 65534.*no token was sent"):
                BrokerKeyStore(path, lambda: "admin/all").names()
            assert listener.stdout.readline() == "b''\n"


def test_ping_needs_no_token_and_records_no_denial(world: World) -> None:
    """The supervisor and `cluster.status` use it."""
    assert not is_broker_alive(world.path)
    with world.serving():
        assert is_broker_alive(world.path)
    assert world.denials == []


def test_requests_are_counted_by_operation_and_result(world: World) -> None:
    """An unknown operation creates no new series."""
    registry = CollectorRegistry()
    with world.serving(metrics=BrokerMetrics(registry)):
        world.client().names()
        with pytest.raises(Unauthenticated):
            world.client("nobody").names()
        with pytest.raises(KeyNotFound):
            world.client().info("features/none/internal")
        world.raw(framed(json.dumps({"op": "fly", "token": "admin/all"}).encode()))
    counted = {
        (sample.labels["operation"], sample.labels["result"]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "falaj_broker_requests_total"
    }
    expected = [("names", "ok"), ("names", "refused"), ("info", "failed"), ("other", "failed")]
    assert counted == dict.fromkeys(expected, 1)
    assert registry.get_sample_value("falaj_broker_request_seconds_count", {"operation": "names"}) == 2


def test_missing_broker_error_names_the_socket_and_the_command(world: World) -> None:
    with pytest.raises(KeyStoreUnavailable, match=rf"{world.path}.*cluster\.up"):
        world.client().names()


def test_running_request_is_answered_before_the_broker_stops(world: World) -> None:
    """The socket is removed afterwards."""
    entered, release = threading.Event(), threading.Event()

    class Slow(Failing):
        def info(self, name: str) -> KeyInfo:
            entered.set()
            assert release.wait(10)
            return INFO

    answers: list[KeyInfo] = []
    idle = world.client()
    with world.serving(Slow(RuntimeError())) as stopped:
        caller = threading.Thread(target=lambda: answers.append(world.client().info(NAME)))
        caller.start()
        assert entered.wait(10)
        stopped.set()
        wait_until(lambda: not world.path.exists())
        release.set()
        caller.join()
    assert answers == [INFO]
    idle.close()


def test_socket_and_folder_are_private(world: World) -> None:
    """Modes 0600 and 0700. A folder that other users can enter is refused."""
    with world.serving():
        assert world.path.stat().st_mode & 0o777 == 0o600
        assert world.path.parent.stat().st_mode & 0o777 == 0o700
    world.path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        run_once(world)


def run_once(world: World) -> None:
    """Run a broker that stops at once."""
    stopped = threading.Event()
    stopped.set()
    Broker(world.gate(), world.path).run(stopped)


def test_only_a_stale_socket_is_replaced(world: World) -> None:
    """A socket of a running broker, a socket of another process, and a file are not replaced."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other_listener:
        other_listener.bind(str(world.path))
        other_listener.listen()
        with pytest.raises(ConfigError, match="listens at"):
            run_once(world)
    assert world.path.is_socket()
    with world.serving():
        wait_until(lambda: answers(world.path))
        with pytest.raises(ConfigError, match="listens at"):
            run_once(world)
        assert world.client().info(NAME) == INFO
    world.path.write_text("mine")
    with pytest.raises(ConfigError, match="is not a socket"):
        run_once(world)
    assert world.path.read_text() == "mine"


def test_too_long_socket_path_is_refused(world: World) -> None:
    """Client and broker name its length."""
    long = world.path.with_name("x" * 98)
    with pytest.raises(ConfigError, match="at most 97"):
        BrokerKeyStore(long, lambda: "token")
    with pytest.raises(ConfigError, match="at most 97"):
        Broker(world.gate(), long)


def test_only_the_same_user_and_root_may_connect() -> None:
    """Independent of the mode of the socket."""
    assert [peer_allowed(uid, own=1000) for uid in (1000, 0, 1001, 65534)] == [True, True, False, False]
    assert [peer_allowed(uid, own=0) for uid in (0, 1000)] == [True, False]


@needs_root
def test_another_user_is_refused_although_the_socket_is_open(world: World) -> None:
    """The denial names the user's number."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
        "print(s.recv(9999)[4:].decode())"
    )
    with world.serving():
        world.path.parent.chmod(0o711)
        world.path.chmod(0o666)
        answer, _ = start_as_nobody(code, str(world.path)).communicate(timeout=20)
        world.path.parent.chmod(0o700)
    assert json.loads(answer)["error"] == "AccessDenied"
    assert world.denials == [
        Denial(principal=None, operation="connect", name="", reason="it comes from user 65534")
    ]


def test_forked_child_opens_its_own_connection(world: World) -> None:
    """Parent and child never get the answers of each other."""
    client = world.client()
    with world.serving(), ExitStack() as stack:
        texts = [client.wrap(NAME, bytes([number]) * 32) for number in range(20)]
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            stack.callback(pool.terminate)
            opened = pool.starmap(client_unwrap, [(world.path, text) for text in texts])
        assert opened == [client.unwrap(NAME, text) for text in texts]


def client_unwrap(path: Path, text: str) -> bytes:
    """Unwrap a secret in a child process."""
    return BrokerKeyStore(path, lambda: "admin/x").unwrap(NAME, text)


def test_many_clients_are_served_at_once(world: World) -> None:

    def work(number: int, client: BrokerKeyStore) -> None:
        for turn in range(20):
            secret = bytes([number, turn]) * 16
            assert client.unwrap(NAME, client.wrap(NAME, secret)) == secret

    with world.serving():
        shared = world.client()
        with ThreadPoolExecutor(12) as threads:
            list(
                threads.map(lambda number: work(number, shared if number % 2 else world.client()), range(12))
            )


def test_broker_imports_no_ray() -> None:
    """The broker starts before the cluster and outlives it."""
    code = (
        "import sys, cluster.security.keys.broker, cluster.security.keys.client, cluster.security.keys.keyring; "
        "print([m for m in ('ray', 'hvac', 'hydra', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
