"""Fixtures for tests of feature tables and training sets."""

from __future__ import annotations

import duckdb
import pytest

from tests.projects.features import FeatureProject
from tests.samples.pit_oracle import connect


@pytest.fixture(scope="module")
def oracle() -> duckdb.DuckDBPyConnection:
    """A database that computes expected values."""
    return connect()


@pytest.fixture
def project(feature_project: FeatureProject) -> FeatureProject:
    """An empty project of training sets."""
    return feature_project
