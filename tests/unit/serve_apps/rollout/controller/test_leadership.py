"""One controller of several acts, and another takes over when it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger, database
from cluster.records import progress
from serve_apps.rollout.controller import leadership
from serve_apps.rollout.controller.leadership import Leadership
from tests.servers.postgresql import end_connections

TAKE_OVER_S = 10.0
HOLDER = """
import sys, time
from pathlib import Path
from cluster.ledger.database import connect
from serve_apps.rollout.controller.leadership import Leadership
leading = Leadership(connect(sys.argv[1]), Path(sys.argv[2]))
while True:
    print(leading.is_held(), flush=True)
    time.sleep(0.1)
"""


def wait_until(held: Callable[[], bool]) -> None:
    """Wait until the lock is held, at most `TAKE_OVER_S`."""
    started = time.monotonic()
    while not held():
        assert time.monotonic() - started < TAKE_OVER_S, "nobody took over"
        time.sleep(0.1)


def test_one_of_two_acts_until_it_releases(url: str, tmp_path: Path) -> None:
    """The other one acts at once afterwards."""
    engine, file = Ledger(url).engine, tmp_path / "rollouts.lock"
    first, second = Leadership(engine, file), Leadership(engine, file)
    assert [first.is_held(), second.is_held(), first.is_held()] == [True, False, True]
    first.release()
    assert [second.is_held(), first.is_held()] == [True, False]
    second.release()


def another_takes_over(url: str, file: Path, how: signal.Signals) -> None:
    """Let a process hold the lock, send it a signal, and wait until this process has the lock."""
    ledger = Ledger(url)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url, str(file)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        waiting = Leadership(ledger.engine, file)
        assert not waiting.is_held()
        psutil.Process(holder.pid).send_signal(how)
        wait_until(waiting.is_held)
        waiting.release()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_another_takes_over_from_a_process_that_was_killed(url: str, tmp_path: Path) -> None:
    """Within ten seconds."""
    another_takes_over(url, tmp_path / "rollouts.lock", signal.SIGKILL)


def test_another_takes_over_from_a_process_that_was_stopped(server: str, tmp_path: Path) -> None:
    """Its connection stays open, as that of a machine without a network does, and the server ends its transaction."""
    another_takes_over(server, tmp_path / "unused", signal.SIGSTOP)


def test_lost_connection_is_a_lost_lock(server: str, tmp_path: Path) -> None:
    """After a restart of the database, the controller takes the lock again."""
    ledger = Ledger(server)
    leading = Leadership(ledger.engine, tmp_path / "unused")
    assert leading.is_held()
    end_connections(ledger.engine)
    with pytest.raises(sa.exc.SQLAlchemyError):
        leading.is_held()
    assert leading.is_held()
    leading.release()


def test_lock_is_no_other_lock_of_the_database() -> None:
    """The controller holds it all the time, so whoever else wanted it would wait for ever."""
    assert leadership._KEY not in {database._LOCK_KEY, progress._REPORT_LOCK}
