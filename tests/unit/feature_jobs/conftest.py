"""Fixtures for all tests of the feature store: a key broker, a Redis server, a ledger, projects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.security.keys.access import KeyAccess
from feature_jobs.store import FeatureView
from tests.projects.features import FeatureProject
from tests.projects.push import INCOME, PushProject
from tests.servers.key_broker import running_broker
from tests.servers.redis_server import running_redis


@pytest.fixture(scope="package")
def access() -> Iterator[KeyAccess]:
    """Access to a key broker that has the keys of the tests' views."""
    views = ("income", "person", "cohort", "sparse", "household", "empty")
    keys = [f"features/{view}/internal" for view in views]
    pushed = ("push/income/sensitive", "quarantine/income/sensitive", "online/income/internal")
    with running_broker(*keys, *pushed, "features/income/personal", "online/income/personal") as access:
        yield access


@pytest.fixture(scope="package")
def redis_url() -> Iterator[str]:
    """URL of a Redis server for the tests."""
    with running_redis() as url:
        yield url


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger."""
    opened = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    yield opened
    opened.close()


@pytest.fixture
def open_project(tmp_path: Path, access: KeyAccess) -> Iterator[Callable[..., PushProject]]:
    """Open projects that are pushed to in the test's folder. They are closed after the test."""
    with contextlib.ExitStack() as opened:

        def open_with(view: FeatureView = INCOME, *, folder: str = ".") -> PushProject:
            (tmp_path / folder).mkdir(exist_ok=True)
            return opened.enter_context(contextlib.closing(PushProject(tmp_path / folder, access, view=view)))

        yield open_with


@pytest.fixture
def project(open_project: Callable[..., PushProject]) -> PushProject:
    """A project whose view declares no key types."""
    return open_project()


@pytest.fixture
def feature_project(tmp_path: Path, access: KeyAccess) -> Iterator[FeatureProject]:
    """An empty project of training sets."""
    with contextlib.closing(FeatureProject(tmp_path / "root", access)) as project:
        yield project
