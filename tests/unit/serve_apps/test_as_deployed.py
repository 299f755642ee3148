"""An application comes back with the settings that it was deployed with."""

from __future__ import annotations

from pathlib import Path

from cluster.settings import OnlineConfig, OnlineKind, PlatformConfig, ReplicaConfig, StorageConfig
from serve_apps.as_deployed import as_deployed, keep_settings


def test_what_an_application_was_deployed_with_is_kept(tmp_path: Path) -> None:
    """By the application, whatever the one that restores it is configured with; the rest is the restorer's."""
    storage = StorageConfig(root=str(tmp_path))
    deployed = PlatformConfig(
        storage=storage,
        replica=ReplicaConfig(num_replicas=3, num_cpus=0.5),
        online=OnlineConfig(kind=OnlineKind.redis, url="redis://127.0.0.1:7777/1"),
    )
    keep_settings(deployed, "m-v1")
    now = PlatformConfig(storage=storage, replica=ReplicaConfig(num_replicas=1))
    now.cluster.region = "oman"
    restored = as_deployed(now, "m-v1")
    assert (restored.replica, restored.online) == (deployed.replica, deployed.online)
    assert restored.cluster == now.cluster
    assert as_deployed(now, "m-v2") == now
