"""The edge's controller over a real ledger and a real HAProxy, while other parts fail."""

from __future__ import annotations

import http.client
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import (
    EdgeLimitSet,
    LedgerEvent,
    RolloutWeightChanged,
    StrangersRefused,
)
from cluster.security.tokens.issuer import rotate_issuer
from cluster.security.tokens.principal import local_keys
from serve_apps.edge.haproxy import unauthenticated
from serve_apps.edge.haproxy.request_limits import Limited
from tests.samples.rollouts import ROLLED_BACK
from tests.servers.controller import CHAMPION_ONLY, ONE, SPLIT, TWO, Running, new_controller
from tests.servers.polling import wait_until


def test_state_file_describes_the_running_haproxy(running: Running) -> None:
    """A command that waited for an application in the state can use it at once."""
    assert running.split() == SPLIT
    running.add_app("m-v3")
    assert "m-v3" in running.ask("show backend")


def test_rollback_does_not_wait_for_serve(running: Running) -> None:
    """While the dashboard hangs, the split still follows the ledger."""
    running.serve.answering.clear()
    running.wait_for_targets()
    running.tell_and_wait(ROLLED_BACK, seconds=5)
    assert running.split() == CHAMPION_ONLY


def test_rollback_does_not_wait_for_a_reload(running: Running) -> None:
    """The serving worker gets the change at once, and the new worker after the reload."""
    running.haproxy.may_load.clear()
    running.haproxy.loading.clear()
    running.serve.targets = {**running.serve.targets, "m-v3": (ONE,)}
    assert running.haproxy.loading.wait(10)
    running.tell_and_wait(ROLLED_BACK, seconds=5)
    assert running.split() == CHAMPION_ONLY
    assert "m-v3" not in running.ask("show backend")
    running.haproxy.may_load.set()
    wait_until(lambda: "m-v3" in running.backends)
    assert running.split() == CHAMPION_ONLY


def test_two_edges_follow_one_ledger(running: Running, tmp_path: Path) -> None:
    """Two edges on two nodes; both apply a weight soon after its event."""
    with new_controller(tmp_path / "other", ledger=running.ledger) as other:
        other.thread.start()
        wait_until(lambda: other.state is not None)
        for weight, bounds in ((5, "500|9500"), (50, "5000|5000")):
            seq = running.tell(RolloutWeightChanged(model="m", rollout="r", weight=weight))
            for edge in (running, other):
                wait_until(lambda edge=edge, seq=seq: edge.applied == seq, seconds=5)  # type: ignore[misc]
                assert edge.split() == f"m-v1|m-v2|challenger|r|s|{bounds}"


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("no JSON"), http.client.IncompleteRead(b"")])
def test_without_serve_the_last_replicas_stay(running: Running, error: Exception) -> None:
    """A later answer of Serve is applied again."""
    running.serve.error = error
    running.wait_for_targets(2)
    assert "m-v2" in running.ask("show backend")
    running.serve.error, running.serve.targets = None, {"m-v1": (ONE,)}
    wait_until(lambda: running.backends == ["m-v1"])


def test_refused_configuration_delays_no_rollback(running: Running) -> None:
    """After an invalid address the old replicas stay, and the split still changes."""
    running.serve.targets = {"m-v1": ("no address",)}
    running.wait_for_targets(2)
    running.tell_and_wait(ROLLED_BACK)
    assert running.split() == CHAMPION_ONLY
    assert "m-v2" in running.ask("show backend")
    assert running.state is not None
    assert "'backend m-v1'" in running.state.refused
    running.serve.targets = {"m-v1": (TWO,)}
    wait_until(lambda: running.backends == ["m-v1"])
    assert running.state.refused == ""


def test_restart_with_a_refused_configuration_serves_the_last_good_one(running: Running) -> None:
    """It does so until HAProxy accepts a configuration. Until then, the state file has the refusal."""
    running.serve.targets = {"m-v1": ("no address",)}
    wait_until(lambda: running.state is not None and bool(running.state.refused))
    for restart in (running.hand_over, running.stop):
        restart()
        running.state_file.unlink()
        running.begin()
        running.thread.start()
        wait_until(lambda: running.state is not None and "'backend m-v1'" in running.state.refused)
        assert running.split() == SPLIT
        assert "m-v2" in running.ask("show backend")
    running.serve.targets = {"m-v1": (TWO,)}
    wait_until(lambda: running.backends == ["m-v1"])


def test_failed_write_of_the_map_is_tried_again(running: Running) -> None:
    """A rollback still takes effect, and nothing counts as applied that a reload could undo."""
    file = Path(running.settings.map_file)
    file.unlink()
    file.mkdir()
    before = running.state
    seq = running.tell(ROLLED_BACK)
    running.wait_for_targets(2)
    assert running.state == before
    assert running.split() == CHAMPION_ONLY
    file.rmdir()
    wait_until(lambda: running.applied == seq)
    assert (running.split(), file.read_text()) == (CHAMPION_ONLY, f"m {CHAMPION_ONLY}\n")


def test_killed_haproxy_restarts_with_its_last_split(running: Running) -> None:
    """This is true even if only a `set map` had changed the split."""
    running.tell_and_wait(ROLLED_BACK)
    before = running.haproxy.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: running.state is not None and running.state.pid not in (before, None))
    assert running.split() == CHAMPION_ONLY


def test_own_limit_is_applied_and_removed_again(running: Running) -> None:
    """The limit is changed in the running map, and in the file, so that it is not lost at a reload."""
    file = running.settings.limits.file(Limited.principal)

    def set_limit(rate: int | None) -> str:
        event = EdgeLimitSet(limited="principal", name="alice b", requests_per_s=rate, concurrent=None)
        running.tell_and_wait(event)
        return running.ask(f"show map {file}").strip()

    assert set_limit(5).endswith("alice%20b 5|384")
    assert set_limit(6).endswith("alice%20b 6|384")
    assert file.read_text() == "* 10000|384\nalice%20b 6|384\n"
    assert set_limit(None).endswith("* 10000|384")
    assert file.read_text() == "* 10000|384\n"


@pytest.mark.parametrize("when", ["now and then", "at the end"])
def test_counts_of_unauthenticated_requests_reach_the_ledger(
    running: Running, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """One event for each reason, also across a reload."""

    def send_without_token(number: int) -> None:
        for _ in range(number):
            connection = running.connect()
            connection.request("POST", "/v1/models/m:predict", b"{}")
            assert connection.getresponse().status == 401
            connection.close()

    send_without_token(2)
    running.add_app("m-v3")
    send_without_token(3)
    if when == "now and then":
        monkeypatch.setattr(unauthenticated, "REPORT_INTERVAL_S", 0.0)
    else:
        running.stopped.set()
    wait_until(lambda: any(running.ledger.entries(StrangersRefused)))
    (entry,) = running.ledger.entries(StrangersRefused)
    assert (entry.actor, entry.payload["count"]) == ("system:edge", 5)


class WatchedLedger(Ledger):
    """A ledger that records from which positions it was read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.read_after: list[int] = []

    def entries(self, kind: type[LedgerEvent] | None = None, *, after: int = 0) -> Iterator[Entry]:
        self.read_after.append(after)
        return super().entries(kind, after=after)


def test_new_controller_starts_from_the_stored_states(running: Running) -> None:
    """It reads no event from before its start, and follows the ledger from there."""
    running.hand_over()
    head = running.ledger.head()
    watched = WatchedLedger(str(running.ledger.engine.url))
    running.ledger = watched
    running.begin()
    running.thread.start()
    seq = running.tell(ROLLED_BACK)
    wait_until(lambda: running.applied == seq)
    assert running.split() == CHAMPION_ONLY
    assert all(after >= head for after in watched.read_after)


class HangingLedger(Ledger):
    """A ledger whose database stops answering."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.answers, self.asked = threading.Event(), threading.Event()
        self.answers.set()

    def head(self) -> int:
        if not self.answers.is_set():
            self.asked.set()
        self.answers.wait(20)
        return super().head()


def test_hanging_ledger_delays_nothing_else(running: Running) -> None:
    """New replicas are used, and a killed HAProxy is restarted. Afterwards, changes are applied again."""
    running.hand_over()
    running.ledger = ledger = HangingLedger(str(running.ledger.engine.url))
    running.begin()
    running.thread.start()
    running.add_app("m-v3")
    ledger.answers.clear()
    assert ledger.asked.wait(10)
    running.add_app("m-v4")
    before = running.haproxy.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: running.state is not None and running.state.pid not in (before, None))
    ledger.answers.set()
    running.tell_and_wait(ROLLED_BACK)
    assert running.split() == CHAMPION_ONLY


def test_rotated_key_reaches_the_edge(running: Running) -> None:
    """The old key stays while its tokens are valid, then goes."""
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


def test_first_configuration_must_load(tmp_path: Path) -> None:
    """If no earlier configuration was accepted, a refused configuration is an error."""
    with new_controller(tmp_path) as edge:
        Path(edge.settings.certificate).unlink()
        with pytest.raises(Exception, match="HAProxy refuses"):
            edge.controller.run(edge.stopped)


def test_controller_ends_if_its_ledger_thread_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor starts it again. Otherwise it would run for ever without any change of the ledger."""
    with new_controller(tmp_path) as edge:
        followed = edge.controller._followed

        def failing(*_: object) -> None:
            raise OSError("no more sockets")

        monkeypatch.setattr(followed._announcements, "wait", failing)
        followed.start()
        wait_until(lambda: followed.has_ended)
        with pytest.raises(RuntimeError, match="has ended"):
            edge.controller.step()
