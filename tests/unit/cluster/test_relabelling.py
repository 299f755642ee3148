"""Describing a key anew, under the real policies: who may make keys opens none by it."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.security.authorization.policy import Action, Decision, Policy, Resource
from cluster.security.keys.__main__ import ACTIONS
from cluster.security.keys.gate import Gate, Operation, widens
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import COLUMN_CLASSES, KeyInfo
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role

POLICY = Policy.load()
VIEW = KeyInfo(name="features/patient/sensitive", column_class="sensitive", purposes=("care",))
LOG = KeyInfo(name="predictions/m/sensitive", column_class="sensitive", purposes=("care",))


def decide(principal: Principal, operation: Operation, info: KeyInfo) -> Decision:
    return POLICY.decide(principal, ACTIONS[operation], Resource.of_key(info), environment="production")


class World:
    """A gate before a keyring with two keys; a token is a role."""

    def __init__(self, folder: Path) -> None:
        self.ring = Keyring.create(folder / "keyring.json", secrets.token_bytes(32))
        self.ring.ensure(VIEW)
        self.ring.ensure(LOG)
        self.changes: list[tuple[str, KeyInfo, KeyInfo]] = []
        self.gate: Gate[Principal] = Gate(
            self.ring,
            verify=lambda token: Principal(subject=token, role=Role(token), purpose="", expires_at=0),
            decide=decide,
            audit=lambda denial: None,
            relabelling=lambda who, old, new: self.changes.append((who.subject, old, new)),
        )

    def ask(self, role: Role, **request: Any) -> dict[str, Any]:
        return dict(self.gate.answer({"token": role.value, **request}))

    def ensure(self, role: Role, info: KeyInfo) -> bool:
        return bool(self.ask(role, op="ensure", info=info.plain())["ok"])


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize(("role", "info"), [(Role.data_engineer, VIEW), (Role.ml_engineer, LOG)])
@pytest.mark.parametrize(
    "changes",
    [
        {"column_class": "internal", "purposes": ()},
        {"column_class": "internal"},
        {"purposes": ()},
        {"purposes": ("care", "marketing")},
        {"purposes": ("marketing",)},
    ],
)
def test_relabelling_opens_nothing(world: World, role: Role, info: KeyInfo, changes: dict[str, Any]) -> None:
    """Neither to its maker nor to anybody whom only the old description kept out."""
    assert not world.ensure(role, dataclasses.replace(info, **changes))
    wrapped = world.ring.wrap(info.name, b"secret")
    assert not world.ask(role, op="unwrap", name=info.name, wrapped=wrapped)["ok"]
    assert world.ring.info(info.name) == info
    assert world.changes == []


def test_narrowing_is_its_makers_and_on_record(world: World) -> None:
    """To say it again changes nothing and is not recorded."""
    wide = dataclasses.replace(VIEW, name="features/patient/personal", column_class="personal", purposes=())
    assert world.ensure(Role.data_engineer, wide)
    narrow = dataclasses.replace(wide, purposes=("care",))
    assert world.ensure(Role.data_engineer, narrow)
    assert world.ensure(Role.data_engineer, narrow)
    assert world.changes == [("data_engineer", wide, narrow)]


def test_widening_takes_who_manages_keys(world: World) -> None:
    """A further purpose, not a lower class."""
    wider = dataclasses.replace(VIEW, purposes=("care", "research"))
    assert world.ensure(Role.admin, wider)
    assert world.changes == [("admin", VIEW, wider)]
    assert not world.ensure(Role.admin, dataclasses.replace(wider, column_class="personal"))


def test_a_change_that_cannot_be_recorded_is_not_made(tmp_path: Path) -> None:
    """The key stays as it is."""

    def full(*_: object) -> None:
        raise OSError("disk full")

    world = World(tmp_path)
    world.gate._relabelling = full
    assert not world.ensure(Role.admin, dataclasses.replace(VIEW, purposes=("research",)))
    assert world.ring.info(VIEW.name) == VIEW


def test_nobody_asks_for_a_widening_itself(world: World) -> None:
    """It is what an `ensure` may be."""
    answer = world.ask(Role.admin, op="widen", name=VIEW.name)
    assert not answer["ok"]
    assert "not widen" in str(answer)


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=3).map(tuple)
infos = st.builds(KeyInfo, name=st.just("x"), column_class=st.sampled_from(COLUMN_CLASSES), purposes=words)


@given(infos, infos, st.sampled_from(["", "a", "b", "c", "d"]))
def test_what_does_not_widen_lets_nobody_in(old: KeyInfo, new: KeyInfo, purpose: str) -> None:
    """Held against the policies: who reads under the new description read under the old one."""
    reader = Principal(subject="a", role=Role.data_scientist, purpose=purpose, expires_at=0)
    as_view = [
        Resource(kind="key", name="features/v/x", column_class=one.column_class, purposes=one.purposes)
        for one in (old, new)
    ]
    before, after = (
        POLICY.decide(reader, Action.unwrap_key, one, environment="production").allowed for one in as_view
    )
    assert widens(old, new) or before or not after
