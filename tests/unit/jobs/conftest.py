"""Fixtures of the monitor's tests."""

from __future__ import annotations

import pytest

from jobs.monitor.calculation.frames import Frames
from tests.unit.jobs.census_frames import census_frames


@pytest.fixture(scope="session")
def census() -> Frames:
    """The census frames. Tests must not change them."""
    return census_frames()
