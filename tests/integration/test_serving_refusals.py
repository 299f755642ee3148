"""Tests of commands with wrong input: exit code 2 and one line."""

from __future__ import annotations

import pytest

from tests.integration.conftest import refusal
from tests.projects.loan import Shop


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("feature_jobs.ingest definitions=loans view=incme", "Did you mean 'income'"),
        ("feature_jobs.ingest definitions=loans view=income source.path=none.parquet", "none.parquet"),
        ("feature_jobs.ingest definitions=loans view=income source.path=loans.py", "loans.py"),
        ("feature_jobs.ingest definitions=loans view=income source.path=customers.parquet", "amount"),
        ("feature_jobs.apply definitions=nothing", "nothing"),
        ("feature_jobs.training_set service=crdit entities=customers.parquet output=x.parquet", "credit"),
        ("feature_jobs.training_set service=credit entities=none.parquet output=x.parquet", "none.parquet"),
        ("jobs.train name=loan training_set=loans.parquet label=nothing split.column=null", "nothing"),
        ("jobs.evaluate name=lone training_set=loans.parquet", "Did you mean 'loan'"),
        ("serve_apps.deploy name=loan version=99", "no version 99"),
        ("serve_apps.rollout action=promote name=loan", "No rollout"),
    ],
)
def test_wrong_input_is_refused_in_one_line(shop: Shop, command: str, said: str) -> None:
    """The exit code is 2. One line says what is wrong, with which thing, and what to do."""
    assert said in refusal(shop.project.run(*command.split()))
