"""Fixture: a running controller of an edge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.controller import Running, running_controller


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with running_controller(tmp_path) as running:
        yield running
