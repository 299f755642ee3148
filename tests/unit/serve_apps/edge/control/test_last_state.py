"""An edge across a restart of its controller, a start without its control plane, and a new certificate."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ledger.events import AliasMoved
from cluster.security.tls.certificates import ensure_tls
from cluster.security.tokens.oidc import RemoteKeys
from cluster.security.tokens.principal import local_keys
from serve_apps.edge.control import last_answers as last
from serve_apps.replica.targets import Targets
from tests.samples.rollouts import ROLLED_BACK
from tests.servers.controller import CHAMPION_ONLY, ONE, SPLIT, Running, entry_of
from tests.servers.polling import wait_until


@contextlib.contextmanager
def request_statuses(running: Running) -> Iterator[list[int]]:
    """Requests without a pause, each on its own connection; the list has their statuses."""
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


def test_second_controller_takes_over_without_a_refused_request(running: Running) -> None:
    """HAProxy serves after the first controller handed over, and gives its sockets to the second one's."""
    before = running.haproxy.pid
    open_connection = running.connect()
    open_connection.request("GET", "/v2/health/live")
    open_connection.getresponse().read()
    with request_statuses(running) as statuses:
        running.hand_over()
        assert running.ask("show info")
        seq = running.tell(ROLLED_BACK)
        running.begin()
        running.thread.start()
        wait_until(lambda: running.applied == seq)
        assert running.haproxy.pid not in (before, None)
        assert running.split() == CHAMPION_ONLY
    assert set(statuses) == {200}
    # The open connection is still the old worker's, which gets changes until it ends.
    running.tell_and_wait(AliasMoved(name="m", alias="champion", version=2, previous=1, reason="better"))
    assert {entry_of(map_text) for map_text in running.ask_all(f"show map {running.settings.map_file}")} == {
        "m-v2|m-v2|champion|none|-|0|10000"
    }
    open_connection.request("GET", "/v2/health/live")
    assert open_connection.getresponse().status == 200
    open_connection.close()
    assert before is not None
    wait_until(lambda: not is_alive(before))


def is_alive(pid: int) -> bool:
    """Return whether a process runs; an ended process that was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def serves(running: Running, split: str) -> bool:
    """Return whether HAProxy serves with a split."""
    try:
        return running.split() == split
    except OSError:
        return False


def rename_table(running: Running, name: str, new_name: str) -> None:
    with running.ledger.engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {name} RENAME TO {new_name}")


@pytest.mark.parametrize("lost", ["Serve", "Serve and ledger"])
def test_edge_without_its_control_plane_serves_its_last_state(running: Running, lost: str) -> None:
    """The last replicas, split and keys, although HAProxy was killed, too."""

    def gone() -> Targets:
        raise OSError("gone")

    wait_until(lambda: running.state_file.with_name("last.json").exists())
    running.stop()
    if "ledger" in lost:
        rename_table(running, "events", "elsewhere")
    running.begin(fetch_targets=gone)
    running.thread.start()
    wait_until(lambda: serves(running, SPLIT))
    assert "m-v2" in running.ask("show backend")
    (key,) = local_keys(running.places).all()
    assert key in running.haproxy_file.read_text()
    if "ledger" in lost:
        rename_table(running, "elsewhere", "events")
    running.tell_and_wait(ROLLED_BACK)
    assert running.split() == CHAMPION_ONLY
    assert "m-v2" in running.ask("show backend")


def test_edge_uses_stored_keys_for_a_day_while_its_issuer_is_down(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next edge uses the stored keys, too, although replicas have changed meanwhile."""

    def down() -> bytes:
        raise OSError("down")

    stored = running.state_file.with_name("last.json")
    wait_until(stored.exists)
    (key,) = local_keys(running.places).all()
    confirmed = 0.0
    for app in ("m-v3", "m-v4"):
        running.stop()
        confirmed = confirmed or json.loads(stored.read_text())["at"]
        running.serve.targets = {**running.serve.targets, app: (ONE,)}
        running.begin(keys=RemoteKeys(down, cooldown_s=0.0))
        running.thread.start()
        wait_until(lambda app=app: app in json.loads(stored.read_text())["targets"])  # type: ignore[misc]
        wait_until(lambda app=app: app in running.backends)  # type: ignore[misc]
        assert key in running.haproxy_file.read_text()
        assert json.loads(stored.read_text())["at"] == confirmed
    monkeypatch.setattr(last, "KEYS_HOLD_S", 0.0)
    wait_until(lambda: key not in running.haproxy_file.read_text())


def test_new_certificate_is_used_without_a_refused_request(running: Running) -> None:
    """It is used as soon as its file exists. An invalid certificate is not used, and does not delay new replicas."""
    file = Path(running.settings.certificate)

    def served_certificate() -> bytes | None:
        connection = running.connect()
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)
        certificate = connection.sock.getpeercert(binary_form=True)
        connection.close()
        return certificate

    before, content = served_certificate(), file.read_bytes()
    with request_statuses(running) as statuses:
        file.write_bytes(b"no certificate")
        running.add_app("m-v3")
        assert served_certificate() == before
        file.unlink()
        ensure_tls(running.places)
        assert file.read_bytes() != content
        wait_until(lambda: served_certificate() != before)
    assert set(statuses) == {200}
    copies = running.state_file.with_name("certificates")
    wait_until(lambda: [copy.read_bytes() for copy in copies.iterdir()] == [file.read_bytes()])
    assert {copy.stat().st_mode & 0o777 for copy in copies.iterdir()} == {0o600}
