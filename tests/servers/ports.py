"""Ports and addresses for servers that tests start.

The ports are below the range from which the kernel takes ports for clients.
"""

from __future__ import annotations

import random
import socket

import psutil
import pytest

from cluster.host.processes import port_is_free

FIRST, LAST = 20_000, 32_000
_drawn: set[int] = set()


def network_address() -> str:
    """Return an address of this machine that is not loopback; skip the test if there is none."""
    if (address := find_network_address()) is None:
        pytest.skip("this machine has no address but loopback, so servers on the network cannot be tested")
    return address


def find_network_address() -> str | None:
    """Return an address of this machine that is not loopback, or None if there is none."""
    for interface in psutil.net_if_addrs().values():
        for address in interface:
            if address.family is socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    return None


def free_port() -> int:
    """Return a port that no process uses. In one process, this function never returns the same port twice."""
    for port in random.sample(range(FIRST, LAST), 100):
        if port not in _drawn and port_is_free(port, ""):
            _drawn.add(port)
            return port
    raise AssertionError(f"no free port between {FIRST} and {LAST}")
