"""The lock that makes one controller of an edge, and what a controller leaves to the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.errors import ConfigError
from cluster.settings import LedgerConfig
from serve_apps.edge.__main__ import EdgeConfig, wait_for_ledger
from serve_apps.edge.control import succession
from serve_apps.edge.control.haproxy_process import HAProxy
from serve_apps.edge.control.last_answers import KEYS_HOLD_S, LastState
from serve_apps.edge.control.succession import sole_controller
from serve_apps.edge.haproxy.keys import JwtKey
from serve_apps.replica.targets import ScaledToZero

HOLDER = """
import signal, sys, threading
from pathlib import Path
from cluster.host.signals import set_on_signal
from serve_apps.edge.control.succession import SIGNAL, sole_controller
stopped = threading.Event()
if sys.argv[2] == "willing":
    set_on_signal([SIGNAL], stopped)
else:
    signal.signal(SIGNAL, signal.SIG_IGN)
with sole_controller(Path(sys.argv[1])):
    print("held", flush=True)
    stopped.wait()
"""


@pytest.mark.parametrize("willing", ["willing", "unwilling"])
def test_second_controller_requests_the_handover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, willing: str
) -> None:
    """Then it waits until the first controller has released the lock."""
    file = tmp_path / "controller.lock"
    command = [sys.executable, "-c", HOLDER, str(file), willing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        if willing == "willing":
            with sole_controller(file):
                assert first.wait(10) == 0
        else:
            monkeypatch.setattr(succession, "DEADLINE_S", 0.2)
            with pytest.raises(ConfigError, match=f"{first.pid} does not hand over"), sole_controller(file):
                pass
            first.send_signal(signal.SIGKILL)
    with sole_controller(file):
        assert int(file.read_text()) > 0


@pytest.mark.parametrize("gone", [True, False])
def test_only_the_lock_holder_gets_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """A new holder has not written its pid yet: the file may have a free pid, or another process's."""
    file = tmp_path / "controller.lock"
    monkeypatch.setattr(succession, "DEADLINE_S", 0.2)
    with subprocess.Popen(["sleep", "60"]) as other, sole_controller(file):
        if gone:
            other.kill()
            other.wait()
        file.write_text(f"{other.pid}\n")
        with pytest.raises(ConfigError, match="does not hand over"), sole_controller(file):
            pass
        assert gone or other.poll() is None
        other.kill()


def test_holder_that_writes_its_pid_late_gets_the_signal_then(tmp_path: Path) -> None:
    file = tmp_path / "controller.lock"
    command = [sys.executable, "-c", HOLDER, str(file), "willing"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        file.write_text("")
        late = threading.Timer(0.1, lambda: file.write_text(f"{first.pid}\n"))
        late.start()
        with sole_controller(file):
            assert first.wait(10) == 0


class FakeHAProxy(HAProxy):
    """Runs nothing, and records whether it was stopped."""

    def __init__(self) -> None:
        self.ended = False

    def serve_last(self) -> bool:
        return True

    def stop(self) -> None:
        self.ended = True


@pytest.mark.parametrize("handed_over", [True, False])
def test_handover_while_the_ledger_is_down_keeps_haproxy_running(tmp_path: Path, handed_over: bool) -> None:
    """A plain stop ends HAProxy. Until then, the edge follows the journal of rollbacks."""
    config = EdgeConfig(ledger=LedgerConfig(url=f"sqlite:///{tmp_path}/none/ledger.db"))
    followed: list[bool] = []
    haproxy, stopped, over = FakeHAProxy(), threading.Event(), threading.Event()
    stopped.set()
    if handed_over:
        over.set()
    with pytest.raises(sa.exc.SQLAlchemyError):
        wait_for_ledger(config, haproxy, stopped, over, lambda: followed.append(True))
    assert haproxy.ended is not handed_over
    assert followed


def test_last_state_round_trips_and_keys_last_a_day(tmp_path: Path) -> None:
    """Keys are dropped if a file is missing, or after a day without an answer of the issuer."""
    file, key = tmp_path / "last.json", JwtKey(kid="k", algorithm="ES256", file=str(tmp_path / "k.pem"))
    last = LastState(targets={"m-v1": ("a:1", "b:2"), "m-v2": ScaledToZero(("p:1",))}, keys=(key,), at=1000.0)
    last.write(file)
    assert LastState.read(file, now=1000.0).keys == ()
    Path(key.file).touch()
    assert LastState.read(file, now=1000.0) == last
    late = LastState.read(file, now=1000.0 + KEYS_HOLD_S)
    assert (late.targets, late.keys) == (last.targets, ())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"targets": [], "keys": [], "at": 1}', "nonsense"])
def test_damaged_last_state_is_empty(tmp_path: Path, content: str) -> None:
    """An edge still starts."""
    file = tmp_path / "last.json"
    file.write_text(content)
    assert LastState.read(file, now=0.0) == LastState() == LastState.read(tmp_path / "none", now=0.0)
