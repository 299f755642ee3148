"""Tests of the ledger's time, with writers whose clocks differ, on SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from cluster.ledger import Ledger
from cluster.ledger.chain import verify_chain
from cluster.ledger.checkpoint import ensure_signer
from cluster.ledger.events import ClusterStopped
from tests.processes import forks

BEHIND = dt.timedelta(minutes=10)


def _late_clock() -> dt.datetime:
    return dt.datetime.now(dt.UTC) - BEHIND


def test_event_of_a_writer_with_a_late_clock_is_not_before_the_event_before_it(
    url: str, tmp_path: Path
) -> None:
    """Its events and checkpoints get the last event's time, until its clock has reached that time."""
    Ledger(url).append(ClusterStopped(cluster_id="first"), actor="user:a")
    late = Ledger(url, signer=ensure_signer(tmp_path / "keys"), checkpoint_every=3, clock=_late_clock)
    late.append(ClusterStopped(cluster_id="second"), actor="user:late")
    late.append(ClusterStopped(cluster_id="third"), actor="user:late")
    Ledger(url).append(ClusterStopped(cluster_id="last"), actor="user:a")
    first, *of_late, last = (entry.time for entry in verify_chain(late.entries()))
    assert of_late == [first] * 3
    assert last > first


def _append_many(url: str, *, late: bool) -> None:
    ledger = Ledger(url, clock=_late_clock) if late else Ledger(url)
    for number in range(25):
        ledger.append(ClusterStopped(cluster_id=str(number)), actor="user:late" if late else "user:a")


def test_ledger_time_never_goes_backwards_with_two_processes(url: str) -> None:
    """Two processes append at the same time, one with a clock that is 10 minutes behind."""
    Ledger(url).append(ClusterStopped(cluster_id="first"), actor="user:a")
    context = forks.context()
    writers = [context.Process(target=_append_many, args=(url,), kwargs={"late": late}) for late in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    entries = list(verify_chain(Ledger(url).entries()))
    times = [entry.time for entry in entries]
    assert len(entries) == 51
    assert times == sorted(times)
