"""What all tests of the ground share."""

from __future__ import annotations

import pytest

from cluster.security.keys import broker


@pytest.fixture(autouse=True)
def quick_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brokers look more often whether they should stop: a hundred tests would wait a fifth of a second each."""
    monkeypatch.setattr(broker, "_LOOK_S", 0.02)
