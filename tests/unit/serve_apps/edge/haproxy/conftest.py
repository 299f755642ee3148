"""Fixture: what stands for Serve's proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.edge import Edge
from tests.servers.serve_proxy import HoldingProxy


@pytest.fixture
def serve_proxy(whole: Edge) -> Iterator[HoldingProxy]:
    """A proxy for applications without a replica, until the edge has its replicas back."""
    with HoldingProxy() as proxy:
        yield proxy
