"""Fixtures for tests of the online store on both of its engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.security.keys.keyring import Keyring
from cluster.settings import OnlineConfig, OnlineKind
from tests.projects.online import SMALL, online_keys


@pytest.fixture(params=list(OnlineKind), ids=lambda kind: kind.value)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> OnlineConfig:
    """The settings of an empty store."""
    if request.param == OnlineKind.lmdb:
        return SMALL
    url = request.getfixturevalue("redis_url")
    return OnlineConfig(kind=OnlineKind.redis, url=url, prefix=tmp_path.name)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    """The keys of a view `v`."""
    return online_keys(tmp_path_factory.mktemp("keys"), "v")
