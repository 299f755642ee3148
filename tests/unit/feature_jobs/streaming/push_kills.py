"""Run a push server and kill it at a random moment."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from cluster.security.keys.access import KeyAccess
from tests.processes import forks
from tests.projects.push import serve

KILLS = int(os.environ.get("FALAJ_KILLS", "1"))


def run_and_kill(
    root: Path,
    access: KeyAccess,
    requests: list[Any],
    kill_after_s: float | None,
    *,
    aggregated: bool = False,
) -> int:
    """Return the number of requests that a server answered before it was killed."""
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
