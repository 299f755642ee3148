"""Rotating a view's keys: which, and what the ledger knows of a rotation that was cut off."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import KeysRotated
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from feature_jobs.rotate_keys import existing_keys, rotate
from feature_jobs.store import Entity, FeatureView, Field, FileSource, Sensitivity
from feature_jobs.store.catalog.protection import view_key_names, view_keys
from feature_jobs.store.catalog.specifications import Definitions, apply, view_spec


class Killed(Exception):
    """The process ends here."""


class Dying(Keyring):
    """A keyring whose caller is killed before the third rotation."""

    rotated = 0

    def rotate(self, name: str) -> int:
        if self.rotated == 2:
            raise Killed
        self.rotated += 1
        return super().rotate(name)


def test_every_rotation_is_on_record_before_the_next(tmp_path: Path) -> None:
    """A kill between two leaves no new version without its event."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    path, kek = tmp_path / "keyring.json", secrets.token_bytes(32)
    ring, names = (
        Keyring.create(path, kek),
        ["features/v/internal", "features/v/personal", "online/v/internal"],
    )
    for name in names:
        ring.ensure(KeyInfo(name=name))
    with pytest.raises(Killed):
        rotate("v", names, Dying(path, kek), ledger, actor="ann")
    recorded = [entry.payload["keys"] for entry in ledger.entries(KeysRotated)]
    assert [info.name for info in existing_keys([*names, "push/v/sensitive"], ring)] == names, (
        "one that is not there yet"
    )
    assert recorded == [{"features/v/internal": 2}, {"features/v/personal": 2}]


@pytest.mark.parametrize(
    "classes", [[], ["public"], ["internal", "personal"], ["public", "sensitive", "personal"]]
)
def test_the_keys_of_a_view_are_those_it_was_applied_with(tmp_path: Path, classes: list[str]) -> None:
    """Whatever its module says by now."""
    view = FeatureView(
        "v",
        entities=[Entity("person", join_keys=["id"])],
        source=FileSource("v.parquet", event_timestamp="at"),
        schema=[
            Field(f"f{n}", "float64", sensitivity=Sensitivity(name))
            for n, name in enumerate(classes or ["public"])
        ],
        owner="test",
    )
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    apply(Definitions(module="m", views={"v": view}, services={}), ledger, actor="test")
    applied = view_key_names(view_spec(ledger, "v"))
    assert sorted(applied) == sorted(info.name for info in view_keys(view, region="local"))


def test_keys_of_personal_columns_are_for_the_views_purposes() -> None:
    """Offline, online, of quarantine and push log; the internal ones, of join keys too, serve every purpose."""
    view = FeatureView(
        "v",
        entities=[Entity("person", join_keys=["id"])],
        source=FileSource("v.parquet", event_timestamp="at"),
        schema=[Field("a", "float64", sensitivity=one) for one in (Sensitivity.PERSONAL,)],
        owner="test",
        purposes=["care", "credit"],
        region="oman",
    )
    made = {
        info.name: (info.column_class, info.purposes, info.region) for info in view_keys(view, region="eu")
    }
    purposes = ("care", "credit")
    assert made == {
        "features/v/internal": ("internal", (), "oman"),
        "online/v/internal": ("internal", (), "oman"),
        "features/v/personal": ("personal", purposes, "oman"),
        "online/v/personal": ("personal", purposes, "oman"),
        "quarantine/v/sensitive": ("sensitive", purposes, "oman"),
        "push/v/sensitive": ("sensitive", purposes, "oman"),
    }
