"""Fixtures of batch scoring: a project with a model of three inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.security.keys.access import KeyAccess
from tests.projects.batch_scoring import KEY, ScoringProject
from tests.servers.key_broker import running_broker

KEYS = (
    *("features/income/internal", "features/income/personal", "training_sets/credit/internal"),
    *("features/home/internal", "predictions/m/sensitive", KEY, "scores/m/personal"),
)


@pytest.fixture(scope="package")
def access() -> Iterator[KeyAccess]:
    """Access to a key broker."""
    with running_broker(*KEYS) as access:
        yield access


@pytest.fixture
def project(tmp_path: Path, access: KeyAccess) -> Iterator[ScoringProject]:
    """A project without a model."""
    project = ScoringProject(tmp_path, access)
    yield project
    project.close()
