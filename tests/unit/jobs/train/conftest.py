"""Fixtures of training's tests: a protected file, and the access to its keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess
from jobs.train.rows.file import RowFile, open_row_file
from tests.servers.key_broker import running_broker

ROWS = 5000
GROUP_ROWS = 400


def people(rows: int = ROWS) -> pa.Table:
    """Return rows with a number, a category, missing values, and a label that depends on both inputs."""
    draw = np.random.default_rng(0)
    age, code = draw.uniform(0, 90, rows), draw.integers(0, 3, rows)
    label = (age / 90 + code / 3 + draw.normal(0, 0.2, rows) > 0.9).astype(np.int64)
    ages = pa.array(age, mask=draw.random(rows) < 0.05)
    return pa.table({"person_id": np.arange(rows), "age": ages, "code": [f"c{n}" for n in code], "y": label})


@pytest.fixture(scope="session")
def access() -> Iterator[KeyAccess]:
    with running_broker("rows", "models/m") as access:
        yield access


@pytest.fixture
def row_file(tmp_path: Path, access: KeyAccess) -> RowFile:
    return write_people(tmp_path, access)


def write_people(folder: Path, access: KeyAccess) -> RowFile:
    """Write a protected file of `people()` with several row groups."""
    uri, protection = str(folder / "rows.parquet"), Protection(default="rows")
    protected_files(access).write(people(), uri, protection, row_group_rows=GROUP_ROWS)
    return open_row_file(uri, access, protection=protection)
