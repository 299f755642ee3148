"""Ports for servers that tests start. They are below the range from which the kernel takes ports for clients."""

from __future__ import annotations

import random

from cluster.processes import port_is_free

FIRST, LAST = 20_000, 32_000
_drawn: set[int] = set()


def free_port() -> int:
    """Return a port that no process uses. In one process, this function never returns the same port twice."""
    for port in random.sample(range(FIRST, LAST), 100):
        if port not in _drawn and port_is_free(port, ""):
            _drawn.add(port)
            return port
    raise AssertionError(f"no free port between {FIRST} and {LAST}")
