"""Fixtures of the tests of logs: the folders of a model's two logs, and a keyring with their keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.security.keys.keyring import Keyring
from tests.samples.record_log import new_keyring


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return new_keyring(tmp_path)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "predictions" / "m"


@pytest.fixture
def outcomes(tmp_path: Path) -> Path:
    return tmp_path / "outcomes" / "m"
