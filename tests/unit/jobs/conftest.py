"""What the monitor's tests share."""

from __future__ import annotations

import pytest

from jobs.monitor.frames import Frames
from tests.unit.jobs.census_frames import census_frames


@pytest.fixture(scope="session")
def census() -> Frames:
    """Nobody changes it."""
    return census_frames()
