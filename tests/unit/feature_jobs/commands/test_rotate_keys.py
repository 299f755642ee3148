"""Rotation of a view's keys: which keys it includes, and which events a killed rotation leaves."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import KeysRotated
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from feature_jobs.rotate_keys import existing_keys, rotate
from feature_jobs.store import Field, Sensitivity
from feature_jobs.store.catalog.protection import view_key_names, view_keys
from feature_jobs.store.catalog.specifications import apply, view_spec
from tests.projects.views import define, make_view


class Killed(Exception):
    """Stands for the end of the process."""


class KilledKeyring(Keyring):
    """A keyring whose caller is killed before the third rotation."""

    rotated = 0

    def rotate(self, name: str) -> int:
        if self.rotated == 2:
            raise Killed
        self.rotated += 1
        return super().rotate(name)


def test_every_rotation_has_an_event_before_the_next_one(tmp_path: Path, ledger: Ledger) -> None:
    """A kill between two rotations leaves no new version without its event."""
    path, kek = tmp_path / "keyring.json", secrets.token_bytes(32)
    ring = Keyring.create(path, kek)
    names = ["features/v/internal", "features/v/personal", "online/v/internal"]
    for name in names:
        ring.ensure(KeyInfo(name=name))
    with pytest.raises(Killed):
        rotate("v", names, KilledKeyring(path, kek), ledger, actor="ann")
    recorded = [entry.payload["keys"] for entry in ledger.entries(KeysRotated)]
    assert recorded == [{"features/v/internal": 2}, {"features/v/personal": 2}]


def test_keys_that_do_not_exist_are_left_out(tmp_path: Path) -> None:
    """A view of an earlier release may lack keys that later releases added."""
    ring = Keyring.create(tmp_path / "keyring.json", secrets.token_bytes(32))
    ring.ensure(KeyInfo(name="features/v/internal"))
    infos = existing_keys(["features/v/internal", "push/v/sensitive"], ring)
    assert [info.name for info in infos] == ["features/v/internal"]


@pytest.mark.parametrize(
    "classes", [[], ["public"], ["internal", "personal"], ["public", "sensitive", "personal"]]
)
def test_key_names_of_an_applied_view_match_its_definition(ledger: Ledger, classes: list[str]) -> None:
    """The names from the ledger are those that were created from the definition."""
    schema = [
        Field(f"f{n}", "float64", sensitivity=Sensitivity(name))
        for n, name in enumerate(classes or ["public"])
    ]
    view = make_view("v", schema=schema)
    apply(define(view), ledger, actor="test")
    applied = view_key_names(view_spec(ledger, "v"))
    assert sorted(applied) == sorted(info.name for info in view_keys(view, region="local"))


def test_personal_and_sensitive_keys_are_limited_to_the_views_purposes() -> None:
    """Internal keys, which encrypt join keys, serve every purpose."""
    schema = [Field("a", "float64", sensitivity=Sensitivity.PERSONAL)]
    view = make_view("v", schema=schema, purposes=["care", "credit"], region="oman")
    keys = {
        info.name: (info.column_class, info.purposes, info.region) for info in view_keys(view, region="eu")
    }
    purposes = ("care", "credit")
    assert keys == {
        "features/v/internal": ("internal", (), "oman"),
        "online/v/internal": ("internal", (), "oman"),
        "features/v/personal": ("personal", purposes, "oman"),
        "online/v/personal": ("personal", purposes, "oman"),
        "quarantine/v/sensitive": ("sensitive", purposes, "oman"),
        "push/v/sensitive": ("sensitive", purposes, "oman"),
    }
