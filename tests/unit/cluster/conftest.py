"""Fixtures of all tests of `cluster`."""

from __future__ import annotations

import pytest

from cluster.security.keys import broker


@pytest.fixture(autouse=True)
def quick_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers check for a stop more often. Otherwise each of a hundred tests would wait a fifth of a second."""
    monkeypatch.setattr(broker, "_POLL_S", 0.02)
