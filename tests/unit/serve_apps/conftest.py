"""Fixtures: one real edge for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.edge import ROLLOUT, Edge, running_edge


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """A running edge, shared by the tests of a module."""
    with running_edge(tmp_path_factory.mktemp("edge")) as running:
        yield running


@pytest.fixture
def whole(edge: Edge) -> Iterator[Edge]:
    """The edge; after the test all its replicas are back."""
    yield edge
    edge.load(ROLLOUT)
