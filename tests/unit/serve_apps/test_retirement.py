"""A retired version is not deployed, and a deployed version is not retired, also if both happen at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.ledger.events import (
    AliasMoved,
    DeploymentRemoved,
    ModelDeployed,
    ModelRegistered,
    ModelReinstated,
    ModelRetired,
)
from cluster.registry import ModelVersion, Registry, require_not_retired, retirement
from cluster.settings import PlatformConfig
from cluster.storage import Layout
from serve_apps.retirement import reinstate, retire


class Permitted:
    """An actor that may do everything."""

    name = "bob"

    def check(self, *_: Any) -> None:
        return None


class World:
    """A ledger with two versions of the model `loan`."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(f"sqlite:///{folder}/l.db")
        self.registry = Registry(self.ledger, Layout(str(folder)))
        for number in (1, 2):
            self.append(
                ModelRegistered(
                    name="loan",
                    version=number,
                    family="f",
                    task="binary",
                    manifest_hash="",
                    files={},
                    lineage={},
                    metrics={},
                )
            )

    def append(self, event: Any) -> None:
        self.ledger.append(event, actor="t")

    def deploy(self, number: int) -> None:
        self.append(
            ModelDeployed(name="loan", version=number, variant="v", app=f"loan-v{number}", route_prefix="/")
        )

    def version(self, number: int) -> ModelVersion:
        return self.registry.get("loan", number)

    def retire(self, number: int, reason: str = "old data") -> None:
        actor: Any = Permitted()
        retire(PlatformConfig(), self.ledger, actor, self.version(number), reason=reason)

    def reinstate(self, number: int) -> None:
        actor: Any = Permitted()
        reinstate(PlatformConfig(), self.ledger, actor, self.version(number), reason="mistake")

    def require_not_retired(self, number: int) -> None:
        require_not_retired(self.ledger, self.registry, self.version(number))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_retired_version_is_refused_until_it_is_reinstated(world: World) -> None:
    """The message has the reason and names another version. A second retirement changes nothing."""
    world.retire(2)
    world.retire(2, "another reason")
    assert len(list(world.ledger.entries(ModelRetired))) == 1
    with pytest.raises(RefusedError, match=r"retired \(old data\)\. Use another one, such as version=1"):
        world.require_not_retired(2)
    world.require_not_retired(1)
    world.reinstate(2)
    world.require_not_retired(2)
    with pytest.raises(RefusedError, match="not retired"):
        world.reinstate(2)


def test_the_last_version_has_no_alternative(world: World) -> None:
    """The message then says to train one."""
    world.retire(1)
    world.retire(2)
    with pytest.raises(RefusedError, match="Train a new version"):
        world.require_not_retired(2)


def test_a_serving_version_is_not_retired(world: World) -> None:
    """The message names the model, what the version does, and the command that ends it."""
    world.deploy(1)
    with pytest.raises(RefusedError, match="is deployed, so it cannot be retired"):
        world.retire(1)
    world.append(AliasMoved(name="loan", alias="champion", version=1, previous=None, reason="first"))
    with pytest.raises(
        RefusedError, match=r"Version 1 is the champion of 'loan'.*action=remove name=loan version=1"
    ):
        world.retire(1)
    world.append(AliasMoved(name="loan", alias="champion", version=2, previous=1, reason="better"))
    world.append(DeploymentRemoved(name="loan", version=1, app="loan-v1", reason="unused"))
    world.retire(1)
    assert retirement(world.ledger, "loan", 1) is not None


def test_a_deployment_at_the_same_time_wins(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is deployed after the check of the retirement and before its event. The retirement is undone."""
    append = world.ledger.append

    def deployed_before(event: Any, *, actor: str) -> Any:
        if isinstance(event, ModelRetired):
            monkeypatch.undo()
            world.deploy(1)
        return append(event, actor=actor)

    monkeypatch.setattr(world.ledger, "append", deployed_before)
    with pytest.raises(RefusedError, match="is deployed"):
        world.retire(1)
    assert retirement(world.ledger, "loan", 1) is None
    assert [entry.type for entry in world.ledger.entries()][-2:] == [
        ModelRetired.__name__,
        ModelReinstated.__name__,
    ]
