"""The settings of features and outcomes over several deployments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.session import write_record
from cluster.settings import (
    Durability,
    IdentityConfig,
    OnlineConfig,
    OnlineKind,
    PlatformConfig,
    ReplicaConfig,
    StorageConfig,
)
from serve_apps.common import Settings, keep_settings, kept_settings
from tests.replica import record

REDIS = OnlineConfig(kind=OnlineKind.redis, url="rediss://r:1/0")
DEFAULT = Settings.of(PlatformConfig())
DISK = Settings.of(PlatformConfig(replica=ReplicaConfig(durability=Durability.disk)))


def test_settings_come_back_from_a_configuration() -> None:
    """All of them, and nothing else of it changes."""
    given = PlatformConfig(
        online=REDIS,
        replica=ReplicaConfig(durability=Durability.disk, max_replicas=7),
        identity=IdentityConfig(service_token_file="t"),
    )
    settings = Settings.of(given)
    assert settings.put_into(given) == given
    put = settings.put_into(PlatformConfig())
    assert (put.online, put.replica.durability, put.identity.service_token_file) == (
        REDIS,
        Durability.disk,
        "t",
    )
    assert put.replica.max_replicas == ReplicaConfig().max_replicas


def test_deployment_that_states_nothing_changes_nothing() -> None:
    """Its defaults are no wish."""
    kept = Settings.of(
        PlatformConfig(
            online=REDIS,
            replica=ReplicaConfig(durability=Durability.disk),
            identity=IdentityConfig(service_token_file="t"),
        )
    )
    assert DEFAULT.over(kept) == kept
    assert DEFAULT.over(DEFAULT) == DEFAULT


def test_deployment_that_states_something_gets_it() -> None:
    """Another store, and outcomes on disk, which no later one takes back."""
    assert Settings.of(PlatformConfig(online=REDIS)).over(DEFAULT).put_into(PlatformConfig()).online == REDIS
    assert DISK.over(DEFAULT) == DISK
    assert DEFAULT.over(DISK) == DISK


def test_settings_outlive_a_lost_head_and_no_new_cluster(tmp_path: Path) -> None:
    """A head that is brought back is of the same cluster, and its applications have the same settings."""
    storage = StorageConfig(root=str(tmp_path))
    config = PlatformConfig(storage=storage)
    mine = record(tmp_path, "", port=0)
    write_record(mine, storage)
    assert kept_settings(config) is None
    keep_settings(config, DISK)
    assert kept_settings(config) == DISK
    write_record(replace(mine, cluster_id="another"), storage)
    assert kept_settings(config) is None
