"""The refusal of ports that are in use."""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack

import pytest

from cluster.errors import PortInUse
from cluster.node.checks import require_free_ports
from cluster.settings import ClusterConfig


def test_all_busy_ports_are_named_at_once() -> None:
    """With the option of each, so that one more start is enough."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        edge, dashboard = (server.getsockname()[1] for server in servers)
        with pytest.raises(PortInUse) as refusal:
            require_free_ports({"edge": edge, "dashboard": dashboard}, ClusterConfig())
    assert re.fullmatch(
        rf"Ports are in use: {edge} \(edge\) by .*, {dashboard} \(dashboard\) by .*\. Free them, or set "
        r"cluster\.ports\.edge=… cluster\.ports\.dashboard=…",
        str(refusal.value),
    )
