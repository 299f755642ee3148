"""Run a push server and kill it at a random moment. Compare the results of jobs afterwards."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from cluster.ledger.events import BatchIngested
from cluster.security.keys.access import KeyAccess
from tests.processes import forks
from tests.projects.push import PushProject, serve

KILLS = int(os.environ.get("FALAJ_KILLS", "1"))


def run_and_kill(
    root: Path,
    access: KeyAccess,
    requests: list[Any],
    kill_after_s: float | None,
    *,
    aggregated: bool = False,
) -> int:
    """Send requests to a new server, and return how many of them it has answered.

    The server is killed `kill_after_s` seconds after the first request. With None, it is killed after the last answer.
    """
    context = forks.context()
    ours, servers = context.Pipe()
    server = context.Process(
        target=serve, args=(str(root), access, servers), kwargs={"aggregated": aggregated}, daemon=True
    )
    server.start()
    servers.close()
    timer = threading.Timer(kill_after_s or 0.0, server.kill)
    done = 0
    try:
        for request in requests:
            ours.send(request)
            if done == 0 and kill_after_s is not None:
                timer.start()
            ours.recv()
            done += 1
    except (EOFError, ConnectionError):
        pass
    timer.cancel()
    server.kill()
    server.join()
    ours.close()
    return done


def require_same_results(actual: PushProject, expected: PushProject) -> None:
    """Require the same counts of rows in the ledger, and the same rows of four people in the online store."""
    assert totals(actual) == totals(expected)
    people = [(person,) for person in range(4)]
    assert actual.store.get(actual.view.spec, people) == expected.store.get(expected.view.spec, people)


def totals(project: PushProject) -> dict[str, int]:
    """Return the sums of the row counts in the ledger over all batches."""
    batches = [entry.payload for entry in project.ledger.entries(BatchIngested)]
    names = ("rows_in", "rows_stored", "rows_quarantined", "rows_late")
    return {name: sum(batch[name] for batch in batches) for name in names}
