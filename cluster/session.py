"""How a process finds the running cluster and attaches to it."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import ClusterNotRunning, ConfigError
from cluster.errors import refusal_behind as refusal_behind
from cluster.own_server import listeners_user
from cluster.processes import answers, cluster_on
from cluster.settings import PlatformConfig, StorageConfig
from cluster.storage import RECORD_NAME, ROOT_VARIABLE, is_uri, layout, project_root, write_bytes

RECORD_VARIABLE = "FALAJ_CLUSTER_RECORD"
NAMESPACE = "falaj"
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray keeps to 127.0.0.1 only where it is told that there is no second node; else it takes the machine's own address,
listens everywhere, and its Prometheus ports are open to the network. Head and drivers must agree on it."""

NO_TELEMETRY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_USAGE_DISABLED": "1"}
"""Ray Data else asks a Prometheus that nobody has started, every ten seconds, and logs that it gets no answer."""
RAYS_LOG_LEVELS = {
    **dict.fromkeys(("ray.serve", "ray.train", "ray.tune", "ray.data._internal"), logging.WARNING),
    # Its only warning is that progress bars, which we turn off, are off.
    "ray.data._internal.progress": logging.ERROR,
}
"""What Ray's libraries say to whoever runs a command: what went wrong, and not how they go about it."""


def tls_environment(storage_root: str, *, on: bool) -> dict[str, str]:
    """What a process needs for TLS between Ray's, with the certificates of `cluster/security/tls`; head and drivers
    must agree on this, too."""
    folder = f"{storage_root}/tls"
    files = {"SERVER_CERT": "node.pem", "SERVER_KEY": "node.key", "CA_CERT": "ca.pem"}
    paths = {f"RAY_TLS_{variable}": f"{folder}/{name}" for variable, name in files.items()}
    return {"RAY_USE_TLS": "1", **paths} if on else {"RAY_USE_TLS": "0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterRecord:
    """What `cluster.up` wrote down about the cluster it started."""

    cluster_id: str
    project_root: str
    storage_root: str
    ray_address: str
    dashboard_url: str
    edge_url: str
    metrics_url: str
    ray_metrics_url: str
    serve_http_url: str
    token_path: str
    temp_dir: str
    key_socket: str
    """Where the key broker listens."""
    tls: bool
    """Whether Ray's processes speak TLS."""
    ports: dict[str, int]
    pids: dict[str, int]
    started_at: str
    policy_environment: str | None = None
    """What the policies call the installation; this and the rest are none in records of an earlier release."""
    region: str | None = None
    issuer: dict[str, Any] | None = None
    """Fields of `IssuerConfig`."""
    tier: str | None = None
    runtime_dir: str | None = None
    """The cluster's own folder for sockets (0700), which Ray is never given. Ray's `temp_dir` lies below it, so that no
    other user can reach that either, although Ray opens it to all."""
    owner_uid: int | None = None
    """The user that the cluster's processes run as: whom its sockets must belong to."""

    gcs_dir: str | None = None
    """Where Ray's GCS keeps what it knows, so that it can be started again."""
    starting: bool = False
    """Whether `cluster.up` is still at it, or was killed while it was."""
    overrides: list[str] | None = None
    """The configuration that its processes have, as words of a command line."""

    @property
    def runtime_folder(self) -> str:
        """Where its sockets lie."""
        return self.runtime_dir or self.temp_dir

    @property
    def owner(self) -> int:
        """The user that its processes run as; by a record of an earlier release, whose state folder it is."""
        if self.owner_uid is not None:
            return self.owner_uid
        folder = Path(self.storage_root)
        return folder.stat().st_uid if folder.is_dir() else os.geteuid()

    def environment(self) -> dict[str, str]:
        """What a shell needs to reach the cluster."""
        return {
            "RAY_ADDRESS": self.ray_address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
            **LOOPBACK,
            **NO_TELEMETRY,
            **tls_environment(self.storage_root, on=self.tls),
            ROOT_VARIABLE: self.project_root,
            RECORD_VARIABLE: record_path(StorageConfig(root=self.storage_root)),
        }


def metrics_urls(record: ClusterRecord) -> list[str]:
    """Where Prometheus finds the metrics of the edge, of Ray and of our own processes."""
    own = [
        f"http://127.0.0.1:{record.ports[name]}/metrics"
        for name in ("supervisor_metrics", "broker_metrics", "edge_controller_metrics")
        if name in record.ports
    ]
    return [record.metrics_url, record.ray_metrics_url, *own]


def record_path(storage: StorageConfig) -> str:
    """Where the record of a storage root's cluster lies; beside the project for a remote root."""
    root = layout(storage).root
    return f"{project_root() / '.falaj' if is_uri(root) else root}/{RECORD_NAME}"


def write_record(record: ClusterRecord, storage: StorageConfig) -> None:
    """Write the record down."""
    write_bytes(record_path(storage), json.dumps(asdict(record), indent=1).encode())


def find_record(storage: StorageConfig) -> ClusterRecord | None:
    """The record, whether its cluster still runs or not; another one's where the environment names it."""
    named = os.environ.get(RECORD_VARIABLE)
    return _read(record_path(storage)) or (_read(named) if named else None)


def find_own_record(storage: StorageConfig) -> ClusterRecord | None:
    """The record of a storage root's own cluster, whether it still runs or not."""
    return _read(record_path(storage))


def _read(path: str) -> ClusterRecord | None:
    """A record; fields that only a newer release knows are passed over.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        content = json.loads(Path(path).read_text())
        known = {each.name for each in fields(ClusterRecord)}
        return ClusterRecord(**{name: value for name, value in content.items() if name in known})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} is damaged: it does not say which cluster is up. Put it back from a backup. Without one, remove "
            f"it, and end the processes that have {RECORD_VARIABLE}={path} in their environment."
        ) from None


def read_record(storage: StorageConfig) -> ClusterRecord | None:
    """The record of a cluster that runs, or none."""
    record = find_record(storage)
    return record if record is not None and is_up(record) else None


def is_up(record: ClusterRecord) -> bool:
    """Whether the recorded head node answers, and not another cluster that took its port since."""
    address = urlsplit(f"//{record.ray_address}")
    host, port = address.hostname or "127.0.0.1", address.port or 0
    if not answers(host=host, port=port) or cluster_on(port) not in (record.cluster_id, None):
        return False
    # Of another user's process that is all that can be seen, and a driver would show it Ray's token.
    return not ipaddress.ip_address(host).is_loopback or listeners_user(host, port) in (None, record.owner, 0)


def recorded(config: PlatformConfig) -> ClusterRecord:
    """The record of the cluster, also while its head does not answer: the rest of it may.

    Raises:
        ClusterNotRunning: there is none.
    """
    record = find_record(config.storage)
    return require_record(config) if record is None else record


def require_record(config: PlatformConfig) -> ClusterRecord:
    """The record of the running cluster.

    Raises:
        ClusterNotRunning: there is none, or its head no longer answers.
    """
    record = find_record(config.storage)
    if record is None:
        raise ClusterNotRunning(
            f"No Falaj cluster is up for {layout(config.storage).root}. Run `python -m cluster.up` there, or let "
            'this shell know of one elsewhere with `eval "$(python -m cluster.status --env)"`.'
        )
    if not is_up(record):
        raise ClusterNotRunning(
            f"The cluster recorded for {record.storage_root} does not answer at {record.ray_address}. Its supervisor "
            "starts what has died again, and `python -m cluster.status` shows how far it is. Where it does not, "
            "`python -m cluster.down` ends what is left, and `python -m cluster.up` starts what is missing."
        )
    return record


def attach(config: PlatformConfig) -> ClusterRecord:
    """Attach this process to the running cluster, as a driver.

    Raises:
        ClusterNotRunning: there is none.
    """
    # Ray's import takes longer than most commands without it, so only who attaches waits for it.
    import ray
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]

    record = require_record(config)
    os.environ.update(record.environment())
    for name, level in RAYS_LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    if not ray.is_initialized():
        # Ray read both when it was imported; this is how ray.init itself makes it read the first again.
        Config.initialize("")
        ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(record.ray_address, namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
    return record
