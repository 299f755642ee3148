"""Settings of `features` and `outcomes` over several deployments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.settings import (
    Durability,
    FeaturesConfig,
    IdentityConfig,
    OnlineConfig,
    OnlineKind,
    PlatformConfig,
    ReplicaConfig,
    StorageConfig,
)
from serve_apps import shared_apps
from serve_apps.shared_apps import Settings, run_shared_apps, settings_at_start
from tests.servers.replica import record

REDIS = OnlineConfig(kind=OnlineKind.redis, url="rediss://r:1/0")
OWN = PlatformConfig(
    online=REDIS,
    replica=ReplicaConfig(durability=Durability.disk, max_replicas=7),
    identity=IdentityConfig(service_token_file="t"),
    features=FeaturesConfig(max_ahead_s=5.0),
)
DEFAULT = Settings.of(PlatformConfig())
DISK = Settings.of(PlatformConfig(replica=ReplicaConfig(durability=Durability.disk)))
SHARED = Settings.of(PlatformConfig(replica=ReplicaConfig(durability=Durability.shared)))


def test_settings_round_trip_through_a_configuration() -> None:
    """All settings, and no other field changes."""
    settings = Settings.of(OWN)
    assert settings.apply_to(OWN) == OWN
    put = settings.apply_to(PlatformConfig())
    values = (put.online, put.replica.durability, put.identity.service_token_file)
    assert values == (REDIS, Durability.disk, "t")
    assert put.replica.max_replicas == ReplicaConfig().max_replicas


def test_deployment_with_defaults_changes_nothing() -> None:
    stored = Settings.of(OWN)
    assert DEFAULT.merged_over(stored) == stored
    assert DEFAULT.merged_over(DEFAULT) == DEFAULT


def test_deployment_with_own_settings_gets_them() -> None:
    """Another store, and outcomes on disk, which a later deployment does not undo."""
    redis = Settings.of(PlatformConfig(online=REDIS)).merged_over(DEFAULT)
    assert redis.apply_to(PlatformConfig()).online == REDIS
    assert DISK.merged_over(DEFAULT) == DISK
    assert DEFAULT.merged_over(DISK) == DISK
    assert SHARED.merged_over(DISK) == DISK.merged_over(SHARED) == SHARED
    ahead = Settings.of(PlatformConfig(features=FeaturesConfig(max_ahead_s=5.0)))
    assert ahead.merged_over(DEFAULT).max_ahead_s == 5.0


def test_new_head_keeps_the_stored_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of a deployment survive a lost head; the next cluster starts with its own."""
    monkeypatch.setattr(shared_apps, "run", lambda apps: None)
    config = PlatformConfig(storage=StorageConfig(root=str(tmp_path)))
    (tmp_path / "edge").mkdir()
    mine = record(tmp_path, "", 1)
    assert settings_at_start(config, mine) == DEFAULT
    run_shared_apps(config, mine, DISK)
    assert settings_at_start(config, mine) == DISK
    stored = tmp_path / "edge" / "common.json"
    whole = stored.read_text()
    for damaged in ("", "[]", whole.replace("durability", "durable")):
        stored.write_text(damaged)
        assert settings_at_start(config, mine) == DEFAULT
        stored.write_text(whole)
    assert settings_at_start(config, replace(mine, cluster_id="next")) == DEFAULT
    assert settings_at_start(config, mine) == DEFAULT
