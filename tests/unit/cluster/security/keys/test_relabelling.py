"""Changing the description of a key, under the real policies: the right to create keys never opens existing ones."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.security.authorization.policy import Action, Decision, Policy, Resource
from cluster.security.keys.gate import Gate, Operation, widens
from cluster.security.keys.guarded import ACTIONS
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import COLUMN_CLASSES, KeyInfo
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role

POLICY = Policy.load()
VIEW = KeyInfo(name="features/patient/sensitive", column_class="sensitive", purposes=("care",))
LOG = KeyInfo(name="predictions/m/sensitive", column_class="sensitive", purposes=("care",))


def decide(principal: Principal, operation: Operation, info: KeyInfo) -> Decision:
    return POLICY.decide(principal, ACTIONS[operation], Resource.from_key(info), environment="production")


class World:
    """A gate in front of a keyring with two keys. A token is the name of a role."""

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

    def request(self, role: Role, **request: Any) -> dict[str, Any]:
        return dict(self.gate.answer({"token": role.value, **request}))

    def ensure(self, role: Role, info: KeyInfo) -> bool:
        return bool(self.request(role, op="ensure", info=info.plain())["ok"])


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
def test_relabelling_opens_no_key(world: World, role: Role, info: KeyInfo, changes: dict[str, Any]) -> None:
    """Neither for the principal that relabels, nor for others."""
    assert not world.ensure(role, dataclasses.replace(info, **changes))
    wrapped = world.ring.wrap(info.name, b"secret")
    assert not world.request(role, op="unwrap", name=info.name, wrapped=wrapped)["ok"]
    assert world.ring.info(info.name) == info
    assert world.changes == []


def test_creator_may_narrow_a_key_and_the_change_is_recorded(world: World) -> None:
    """Repeating the change records nothing."""
    wide = dataclasses.replace(VIEW, name="features/patient/personal", column_class="personal", purposes=())
    assert world.ensure(Role.data_engineer, wide)
    narrow = dataclasses.replace(wide, purposes=("care",))
    assert world.ensure(Role.data_engineer, narrow)
    assert world.ensure(Role.data_engineer, narrow)
    assert world.changes == [("data_engineer", wide, narrow)]


def test_only_a_key_manager_may_widen_a_key(world: World) -> None:
    """A further purpose is allowed, a lower class than in the name is not."""
    wider = dataclasses.replace(VIEW, purposes=("care", "research"))
    assert world.ensure(Role.admin, wider)
    assert world.changes == [("admin", VIEW, wider)]
    assert not world.ensure(Role.admin, dataclasses.replace(wider, column_class="personal"))


def test_change_that_cannot_be_recorded_is_not_made(tmp_path: Path) -> None:

    def full(*_: object) -> None:
        raise OSError("disk full")

    world = World(tmp_path)
    world.gate._relabelling = full
    assert not world.ensure(Role.admin, dataclasses.replace(VIEW, purposes=("research",)))
    assert world.ring.info(VIEW.name) == VIEW


def test_widen_is_not_a_request(world: World) -> None:
    """It is only a kind of `ensure`."""
    answer = world.request(Role.admin, op="widen", name=VIEW.name)
    assert not answer["ok"]
    assert "not widen" in str(answer)


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=3).map(tuple)
infos = st.builds(KeyInfo, name=st.just("x"), column_class=st.sampled_from(COLUMN_CLASSES), purposes=words)


@given(infos, infos, st.sampled_from(["", "a", "b", "c", "d"]))
def test_change_that_does_not_widen_gives_no_new_reader(old: KeyInfo, new: KeyInfo, purpose: str) -> None:
    """Compared with the policies: a reader under the new description is a reader under the old one."""
    reader = Principal(subject="a", role=Role.data_scientist, purpose=purpose, expires_at=0)
    resources = [
        Resource(kind="key", name="features/v/x", column_class=info.column_class, purposes=info.purposes)
        for info in (old, new)
    ]
    before, after = (
        POLICY.decide(reader, Action.unwrap_key, info, environment="production").allowed for info in resources
    )
    assert widens(old, new) or before or not after
