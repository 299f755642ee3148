"""Messages of a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.runtime.signature import LANGUAGE_MODEL
from cluster.settings import PlatformConfig
from serve_apps.deploy import deploy, describe
from serve_apps.rollout.serving_state import ModelState, Rollout, Shadow
from tests.samples.model_versions import model_version

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
