"""Fixtures of the tests of policies."""

from __future__ import annotations

import pytest

from cluster.security.authorization.policy import Policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load()
