"""Fixtures of the tests of tokens: a development issuer in a storage root, and an OIDC issuer on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.security.tokens.issuer import ensure_issuer
from cluster.security.tokens.principal import TokenVerifier
from cluster.storage import Layout
from tests.servers.oidc_issuer import Issuer


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A storage root with a development issuer that no test changes."""
    places = Layout(str(tmp_path_factory.mktemp("root")))
    ensure_issuer(places)
    return places


@pytest.fixture
def fresh(tmp_path: Path) -> Layout:
    """A storage root whose development issuer the test may change."""
    places = Layout(str(tmp_path / "root"))
    ensure_issuer(places)
    return places


@pytest.fixture(scope="module")
def verifier(places: Layout) -> TokenVerifier:
    return TokenVerifier.of(places)


@pytest.fixture(scope="module")
def kid(places: Layout) -> str:
    jwks = json.loads((Path(places.keys) / "jwks.json").read_text())
    return str(jwks["keys"][0]["kid"])


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.close()
