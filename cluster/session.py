"""Find the running cluster and attach this process to it."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from cluster.errors import ClusterNotRunning, ConfigError
from cluster.errors import refusal_behind as refusal_behind
from cluster.host.port_owner import PortState, listener_uid
from cluster.host.processes import cluster_of_listener, port_answers
from cluster.host.this_node import LOOPBACK_ADDRESS, RECORD_VARIABLE, is_loopback
from cluster.scheduling import LOWER_PRIORITY
from cluster.settings import LedgerConfig, OnlineConfig, PlatformConfig, StorageConfig
from cluster.settings_conversion import load, unquoted
from cluster.storage import RECORD_NAME, ROOT_VARIABLE, Layout, layout, write_bytes

NAMESPACE = "falaj"
_RAY_NETWORK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

NO_TELEMETRY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_USAGE_DISABLED": "1"}
"""Turns off usage reports. For these reports, Ray Data would query a Prometheus server that does not exist every ten
seconds, and log each failure."""
RAY_LOG_LEVELS = {
    **dict.fromkeys(("ray.serve", "ray.train", "ray.tune", "ray.data._internal"), logging.WARNING),
    # The only warning of this logger says that progress bars are off. Falaj turns them off on purpose.
    "ray.data._internal.progress": logging.ERROR,
}
"""Log levels of Ray's libraries in a command. They log problems, but no progress."""
PLACES: dict[str, type[Any]] = {"storage": StorageConfig, "ledger": LedgerConfig, "online": OnlineConfig}
"""Sections of the configuration with the places of state."""
METRICS_PORTS = (
    "supervisor_metrics",
    "broker_metrics",
    "edge_controller_metrics",
    "scheduler_metrics",
    "nodes_metrics",
    "uploader_metrics",
    "jobs_metrics",
    "rollouts_metrics",
)
"""Names of the ports where Falaj's own processes serve metrics."""


def network_environment(address: str) -> dict[str, str]:
    """Return the variable that lets Ray use a node's address, or keeps it on 127.0.0.1 if that is the address.

    Without it Ray would always use the machine's own address, listen on every address, and open its Prometheus ports
    to the network. All nodes and drivers must have the same value.
    """
    return {_RAY_NETWORK: "0" if is_loopback(address) else "1"}


def tls_environment(places: Layout, *, on: bool) -> dict[str, str]:
    """Return the variables that turn TLS between Ray's processes on or off.

    `cluster/security/tls` makes the certificates. Head and drivers must have the same values.
    """
    folder = places.tls
    files = {"SERVER_CERT": "node.pem", "SERVER_KEY": "node.key", "CA_CERT": "ca.pem"}
    paths = {f"RAY_TLS_{variable}": f"{folder}/{name}" for variable, name in files.items()}
    return {"RAY_USE_TLS": "1", **paths} if on else {"RAY_USE_TLS": "0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterRecord:
    """The cluster that `cluster.up` started, as stored in `cluster.json`. Fields with a default may be missing in the
    file, because earlier releases did not write them."""

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
    """Path of the key broker's socket."""
    tls: bool
    """Whether Ray's processes use TLS."""
    ports: dict[str, int]
    pids: dict[str, int]
    started_at: str
    policy_environment: str | None = None
    """Name of the installation's environment in the policies."""
    region: str | None = None
    issuer: dict[str, Any] | None = None
    """Fields of `IssuerConfig`."""
    tier: str | None = None
    runtime_dir: str | None = None
    """The cluster's private folder for sockets (mode 0700). Ray's `temp_dir` is below this folder: Ray makes `temp_dir`
    accessible to all users, but they cannot enter this folder."""
    owner_uid: int | None = None
    """User id of the cluster's processes and of its sockets."""

    gcs_dir: str | None = None
    """Folder with the state of Ray's GCS. A restarted GCS loads this state."""
    starting: bool = False
    """Whether `cluster.up` is still starting the cluster, or was killed before it had started the cluster."""
    overrides: list[str] | None = None
    """Configuration of the cluster's processes, as command-line arguments."""

    local_root: str | None = None
    """`storage.local`; None means `storage_root`."""
    address: str = LOOPBACK_ADDRESS
    """Address of this machine in the cluster."""
    node_id: str | None = None
    """Id of a node that joined; null on the head."""
    head: str | None = None
    """`host:port` where a node reaches the head's service for nodes; null on the head."""
    has_edge: bool = True
    """Whether this machine has an edge."""
    own_vault: bool = False
    """Whether a node that joined gets keys from Vault with its own login."""

    @property
    def instance(self) -> str:
        """Name of this machine's part of the cluster: its processes and its folder for sockets have it."""
        return self.cluster_id if self.node_id is None else f"{self.cluster_id}-{self.node_id}"

    @property
    def has_nodes(self) -> bool:
        """Whether other nodes can be in the cluster."""
        return not is_loopback(self.address)

    @property
    def storage(self) -> StorageConfig:
        """Configuration of the cluster's storage."""
        return StorageConfig(root=self.storage_root, local=self.local_root)

    @property
    def layout(self) -> Layout:
        """Folders of the cluster's state."""
        return Layout(self.storage_root, self.local_root or "")

    @property
    def runtime_folder(self) -> str:
        """Folder of the cluster's sockets."""
        return self.runtime_dir or self.temp_dir

    @property
    def jobs_socket(self) -> str:
        """Path of the socket of the service for submitted jobs, also on a node that joined."""
        return f"{self.runtime_folder}/jobs.sock"

    @property
    def rollouts_socket(self) -> str:
        """Path of the socket of this machine's controller of rollouts."""
        return f"{self.runtime_folder}/rollouts.sock"

    @property
    def owner(self) -> int:
        """User id of the cluster's processes. If the record has no user id, it is the owner of the state folder."""
        if self.owner_uid is not None:
            return self.owner_uid
        folder = Path(self.layout.disk)
        return folder.stat().st_uid if folder.is_dir() else os.geteuid()

    def environment(self) -> dict[str, str]:
        """Return the environment variables that a shell needs to reach the cluster."""
        return {
            "RAY_ADDRESS": self.ray_address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
            **network_environment(self.address),
            **NO_TELEMETRY,
            **tls_environment(self.layout, on=self.tls),
            ROOT_VARIABLE: self.project_root,
            RECORD_VARIABLE: record_path(self.storage),
        }


def metrics_urls(record: ClusterRecord) -> list[str]:
    """Return the URLs where Prometheus finds the metrics of the edge, of Ray and of Falaj's own processes."""
    runs_here = {
        "edge_controller_metrics": record.has_edge,
        "scheduler_metrics": record.node_id is None,
        "jobs_metrics": record.node_id is None,
        "rollouts_metrics": record.has_edge,
        "nodes_metrics": record.has_nodes and record.node_id is None,
        "uploader_metrics": record.layout.shared is not None,
    }
    names = [name for name in METRICS_PORTS if name in record.ports and runs_here.get(name, True)]
    own = [f"http://127.0.0.1:{record.ports[name]}/metrics" for name in names]
    return [*([record.metrics_url] if record.has_edge else []), record.ray_metrics_url, *own]


def addresses(record: ClusterRecord) -> str:
    """Return the lines that `cluster.up` and `cluster.status` print about the cluster's URLs."""
    dashboard = f"{record.dashboard_url}  ({record.token_path})"
    lines = [f"Ray dashboard  {dashboard}", f"metrics        {' '.join(metrics_urls(record))}"]
    if record.has_edge:
        lines[0] = f"Ray dashboard  {record.edge_url}/ray/  (an admin's token), {dashboard}"
        lines.insert(0, f"edge           {record.edge_url}")
    return "\n".join(lines)


def record_path(storage: StorageConfig) -> str:
    """Return the path of the record of the cluster at a storage root."""
    return f"{layout(storage).disk}/{RECORD_NAME}"


def write_record(record: ClusterRecord, storage: StorageConfig) -> None:
    """Write the record to its file."""
    write_bytes(record_path(storage), json.dumps(asdict(record), indent=1).encode())


def find_record(storage: StorageConfig) -> ClusterRecord | None:
    """Return the record of a cluster, or None if there is no record. The cluster need not run.

    Return the storage root's own record or, if it does not exist, the record that `FALAJ_CLUSTER_RECORD` names.
    """
    path = os.environ.get(RECORD_VARIABLE)
    return _read(record_path(storage)) or (_read(path) if path else None)


def find_own_record(storage: StorageConfig) -> ClusterRecord | None:
    """Return the record of the storage root's own cluster, or None if there is no record. The cluster need not run."""
    return _read(record_path(storage))


def _read(path: str) -> ClusterRecord | None:
    """Read a record, or return None if the file does not exist. Fields that only a newer release knows are ignored.

    Raises:
        ConfigError: The file is damaged.
    """
    try:
        content = json.loads(Path(path).read_text())
        known = {field.name for field in fields(ClusterRecord)}
        return ClusterRecord(**{name: value for name, value in content.items() if name in known})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} is damaged: the running cluster cannot be read from it. Restore the file from a backup. Without "
            f"one, remove it, and end the processes that have {RECORD_VARIABLE}={path} in their environment."
        ) from None


def find_running_record(storage: StorageConfig) -> ClusterRecord | None:
    """Return the record of the cluster if it runs, else None."""
    record = find_record(storage)
    return record if record is not None and is_up(record) else None


def is_up(record: ClusterRecord) -> bool:
    """Return whether the head node answers. Return False if another cluster now uses its port."""
    address = urlsplit(f"//{record.ray_address}")
    host, port = address.hostname or "127.0.0.1", address.port or 0
    if not port_answers(host=host, port=port):
        return False
    if record.node_id is not None:
        return True
    if cluster_of_listener(port) not in (record.cluster_id, None):
        return False
    # The environment of another user's process is not visible, so its user is checked. Otherwise a driver could send
    # Ray's token to that process.
    return not ipaddress.ip_address(host).is_loopback or listener_uid(host, port) in (
        PortState.unknown,
        record.owner,
        0,
    )


def require_recorded_cluster(config: PlatformConfig) -> ClusterRecord:
    """Return the record of the cluster. Its head need not answer, because other parts may still run.

    Raises:
        ClusterNotRunning: No record exists.
    """
    record = find_record(config.storage)
    return require_running_cluster(config) if record is None else record


def require_running_cluster(config: PlatformConfig) -> ClusterRecord:
    """Return the record of the running cluster.

    Raises:
        ClusterNotRunning: No record exists, or the head does not answer.
    """
    record = find_record(config.storage)
    if record is None:
        raise ClusterNotRunning(
            f"No Falaj cluster is up for {layout(config.storage).root}. Run `python -m cluster.up` there. To use a "
            'cluster of another folder, run `eval "$(python -m cluster.status --env)"` in that folder.'
        )
    if not is_up(record):
        raise ClusterNotRunning(
            f"The cluster recorded for {record.storage_root} does not answer at {record.ray_address}. Its supervisor "
            "restarts dead parts, and `python -m cluster.status` shows the progress. If that fails, run "
            "`python -m cluster.up` to start the missing parts, or `python -m cluster.down` to end the rest."
        )
    return record


def use_recorded_places(config: PlatformConfig, *, given: Collection[str]) -> None:
    """Set storage, ledger and online store of a configuration from the cluster's record, in place.

    Nothing changes if there is no record, or if the configuration has another storage root. If the command line sets
    only `storage.local`, the rest of `storage` comes from the record in that folder.

    Args:
        config: The command's configuration.
        given: Dotted names of the options that the command line sets. Their sections stay as they are.
    """
    record = find_record(config.storage)
    if record is None or record.overrides is None:
        return
    sections = {name.split(".")[0] for name in given}
    free = [name for name, kind in PLACES.items() if name not in sections and getattr(config, name) == kind()]
    if (
        _names_only_its_folder(config.storage, given=given)
        and record.layout.disk == layout(config.storage).disk
    ):
        free.append("storage")
    if "storage" not in free and layout(config.storage).root != record.storage_root:
        return
    for name in free:
        setattr(config, name, _recorded_section(name, record.overrides))


def _names_only_its_folder(storage: StorageConfig, *, given: Collection[str]) -> bool:
    """Return whether a command line sets `storage.local` and nothing else of `storage`."""
    only_local = {name for name in given if name.split(".")[0] == "storage"} == {"storage.local"}
    return only_local and storage == StorageConfig(local=storage.local)


def _recorded_section(name: str, overrides: Iterable[str]) -> Any:
    """Return a section of the recorded configuration."""
    prefix = f"++{name}."
    mine = (override.removeprefix(prefix) for override in overrides if override.startswith(prefix))
    pairs = (text.partition("=") for text in mine)
    values = {key: unquoted(value) for key, _, value in pairs}
    return load(OmegaConf.create(values), PLACES[name])


def use_cluster(record: ClusterRecord) -> None:
    """Set the variables with which Ray finds the cluster and its token, and let Ray read them."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    os.environ.update(record.environment())
    # Ray reads its variables only when it is imported. `ray.init` also makes this call, to read them again.
    Config.initialize("")


def attach(config: PlatformConfig, *, is_background: bool = False) -> ClusterRecord:
    """Attach this process to the running cluster, as a Ray driver.

    Args:
        config: Configuration of the command.
        is_background: Whether the command's worker processes get the lowest priority, from their start on.

    Raises:
        ClusterNotRunning: No cluster runs.
    """
    # Ray is imported here, because the import takes longer than most commands that do not need Ray.
    import ray
    from ray._private import ray_constants

    record = require_running_cluster(config)
    use_cluster(record)
    for name, level in RAY_LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    if not ray.is_initialized():
        ray_constants.ENABLE_RAY_CLUSTER = record.has_nodes
        ray.init(
            record.ray_address,
            namespace=NAMESPACE,
            logging_level=logging.WARNING,
            log_to_driver=False,
            # Several nodes can run on one machine. Loopback needs no choice, and Ray would replace it.
            _node_ip_address=record.address if record.has_nodes else None,
            runtime_env={"worker_process_setup_hook": LOWER_PRIORITY} if is_background else None,
        )
    return record
