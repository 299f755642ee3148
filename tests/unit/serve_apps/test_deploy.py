"""Messages of a deployment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.ledger.store import utc_now
from cluster.registry import Registry
from cluster.runtime.signature import LANGUAGE_MODEL
from cluster.settings import PlatformConfig
from cluster.storage import Layout
from serve_apps.deploy import deploy, describe, serving
from serve_apps.rollout.history import History, Promotion
from serve_apps.rollout.serving_state import ModelState, Rollout, Shadow
from tests.samples.model_versions import model_version, registered

VERSION = model_version(version=2)


def test_deployment_describes_the_traffic_of_the_version() -> None:
    """A version that gets none is told the command that starts a rollout."""
    message = describe(VERSION, ModelState(), app="m-v2", champion=1)
    assert "version 1 stays champion and keeps its traffic" in message
    assert "python -m serve_apps.rollout action=start name=m version=2 weight=10" in message
    assert "serving" not in message
    alone = describe(VERSION, ModelState(), app="m-v2", champion=2)
    assert alone == "serving m version 2 as application m-v2"
    rollout = Rollout(id="r", salt="s", treatment_version=2, treatment_variant="t", weight=10)
    assert "running rollout" in describe(VERSION, ModelState(rollout=rollout), app="m-v2", champion=1)
    shadow = ModelState(shadow=Shadow(version=2, app="m-v2", share=10))
    assert "as a shadow" in describe(VERSION, shadow, app="m-v2", champion=1)


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    """Before keys are created and an application starts. The message says why in one line."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    version = model_version(task=LANGUAGE_MODEL)
    with pytest.raises(RefusedError, match=r"^m version 1 is a language model .* cannot be deployed.*\.$"):
        deploy(PlatformConfig(), ledger, cast(Any, None), version, variant="champion")
    assert ledger.head() == 0


def test_predecessors_are_restored_after_all_versions_that_answer(tmp_path: Path) -> None:
    """Requests wait for champions, treatments and shadows of all models, and for no predecessor."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    for name in ("a", "b"):
        for number in (1, 2, 3):
            ledger.append(registered(name, number), actor="bob")
    states = {
        name: ModelState(apps={1: f"{name}-v1", 2: f"{name}-v2"}, champion_version=2) for name in ("a", "b")
    }
    states["b"] = replace(states["b"], shadow=Shadow(version=3, app="b-v3", share=10))
    promotion = Promotion(rollout="r", version=2, predecessor=1, at=utc_now().isoformat())
    histories = {name: History(champion=2, promotion=promotion) for name in ("a", "b")}
    versions = serving(states, histories, Registry(ledger, Layout(str(tmp_path))))
    assert [(one.name, one.version) for one in versions] == [
        *(("a", 2), ("b", 2), ("b", 3)),
        *(("a", 1), ("b", 1)),
    ]
