"""One real edge for the tests of a module."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edge import ROLLOUT, Edge


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    short = Path("/tmp") / f"falaj-edge-{random.randrange(10**9)}"
    short.mkdir(mode=0o700)
    running = Edge(tmp_path_factory.mktemp("edge"), short)
    yield running
    running.close()
    shutil.rmtree(short)


@pytest.fixture
def whole(edge: Edge) -> Iterator[Edge]:
    """The edge, with all its replicas again after the test."""
    yield edge
    edge.load(ROLLOUT)
