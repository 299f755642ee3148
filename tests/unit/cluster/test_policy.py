"""Who may do what."""

from __future__ import annotations

import pytest

from cluster.security.policy import ALLOWED, Action, Role, allowed

PREDICTS = {Role.service, Role.ml_engineer, Role.data_scientist, Role.admin}
WRITES_OUTCOMES = {Role.service, Role.ml_engineer, Role.admin}


@pytest.mark.parametrize("role", list(Role))
def test_the_table_is_the_one_agreed_upon(role: Role) -> None:
    """Each action for each role, spelt out a second time."""
    assert allowed(role, Action.predict) == (role in PREDICTS)
    assert allowed(role, Action.write_outcome) == (role in WRITES_OUTCOMES)
    assert allowed(role, Action.read_metadata)


def test_every_action_has_a_row() -> None:
    """A new action without one is denied to all, which a test should say before a user does."""
    assert set(ALLOWED) == set(Action)


def test_what_is_not_in_the_table_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even for the admin."""
    monkeypatch.delitem(ALLOWED, Action.predict)
    assert not allowed(Role.admin, Action.predict)
