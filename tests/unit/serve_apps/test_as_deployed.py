"""An application comes back with the settings that it was deployed with."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.settings import (
    IdentityConfig,
    OnlineConfig,
    OnlineKind,
    PlatformConfig,
    ReplicaConfig,
    StorageConfig,
)
from cluster.storage import layout, write_bytes
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


def test_replicas_come_back_as_whom_they_were(tmp_path: Path) -> None:
    """The file of their token and their purpose are theirs; who restores them acts as somebody else."""
    storage = StorageConfig(root=str(tmp_path))
    keep_settings(
        PlatformConfig(storage=storage, identity=IdentityConfig(service_token_file="t", purpose="credit")),
        "m-v1",
    )
    now = PlatformConfig(storage=storage, identity=IdentityConfig(token_file="supervisor.jwt"))
    identity = as_deployed(now, "m-v1").identity
    assert (identity.service_token_file, identity.purpose) == ("t", "credit")
    assert identity.token_file == "supervisor.jwt"


def test_settings_without_an_identity_are_read(tmp_path: Path) -> None:
    """The restorer's counts then."""
    config = PlatformConfig(storage=StorageConfig(root=str(tmp_path)))
    write_bytes(layout(config.storage).serving("m-v1"), json.dumps({"replica": {"num_replicas": 4}}).encode())
    restored = as_deployed(config, "m-v1")
    assert (restored.replica.num_replicas, restored.identity) == (4, config.identity)
