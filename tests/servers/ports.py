"""Ports for servers that tests start: below those that the kernel gives to clients, which come and go meanwhile."""

from __future__ import annotations

import random

from cluster.processes import port_is_free

FIRST, LAST = 20_000, 32_000
_drawn: set[int] = set()


def free_port() -> int:
    """A port that nobody is bound to, and that this process was not given before."""
    for port in random.sample(range(FIRST, LAST), 100):
        if port not in _drawn and port_is_free(port, ""):
            _drawn.add(port)
            return port
    raise AssertionError(f"no free port between {FIRST} and {LAST}")
