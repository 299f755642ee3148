"""A restored application gets the settings that it was deployed with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.settings import (
    IdentityConfig,
    OnlineConfig,
    OnlineKind,
    PlatformConfig,
    ReplicaConfig,
    StorageConfig,
)
from serve_apps.deployed_settings import store_settings, with_deployed_settings


def test_restore_uses_the_stored_settings(tmp_path: Path) -> None:
    """All other settings are those of the restoring command."""
    storage = StorageConfig(root=str(tmp_path))
    deployed = PlatformConfig(
        storage=storage,
        replica=ReplicaConfig(num_replicas=3, num_cpus=0.5),
        online=OnlineConfig(kind=OnlineKind.redis, url="redis://127.0.0.1:7777/1"),
        identity=IdentityConfig(
            purpose="credit_scoring", service_token_file="/run/service.jwt", token_file="mine"
        ),
    )
    store_settings(deployed, "m-v1")
    now = PlatformConfig(storage=storage, replica=ReplicaConfig(num_replicas=1))
    now.cluster.region = "oman"
    restored = with_deployed_settings(now, "m-v1")
    assert (restored.replica, restored.online) == (deployed.replica, deployed.online)
    assert (restored.identity.purpose, restored.identity.service_token_file) == (
        "credit_scoring",
        "/run/service.jwt",
    )
    assert restored.identity.token_file is None
    assert restored.cluster == now.cluster
    assert with_deployed_settings(now, "m-v2") == now


def test_stored_settings_of_an_earlier_release_are_read(tmp_path: Path) -> None:
    """Missing settings are those of the restoring command."""
    now = PlatformConfig(
        storage=StorageConfig(root=str(tmp_path)), identity=IdentityConfig(service_token_file="/run/t.jwt")
    )
    store_settings(now, "m-v1")
    path = tmp_path / "serving" / "m-v1.json"
    stored = json.loads(path.read_text())
    del stored["identity"]
    path.write_text(json.dumps(stored))
    assert with_deployed_settings(now, "m-v1") == now
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"m-v1\.json is damaged.*Deploy it again"):
        with_deployed_settings(now, "m-v1")
