"""Start and end the processes of a cluster. `cluster.up`, `cluster.down` and the supervisor use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from cluster.errors import FalajError
from cluster.host import processes
from cluster.host.this_node import RECORD_VARIABLE
from cluster.node import gcs_store
from cluster.node.parts import Part, find_parts
from cluster.security.encryption.scratch import memory_folder
from cluster.session import ClusterRecord, network_environment, record_path, tls_environment
from cluster.settings import PlatformConfig
from cluster.settings_conversion import quoted
from cluster.storage import ROOT_VARIABLE, layout, local, resolve

START_DEADLINE_S = 60.0
RAY_START_S = 180.0
SUPERVISOR_GRACE_S = 5.0
NUM_REPLICA_PORTS = 1000
HEADLESS_S = 3600
"""Seconds for which Ray's processes on other nodes wait for a lost head, and the processes on a head for Redis. Ray's
default is one minute."""
USER_FIELDS = ("token_file", "role", "purpose")
"""Fields of the identity that describe the user of one command. The cluster's processes do not get them."""
START_RAY = (sys.executable, "-m", "cluster.node.ray_start", "start")
LOG_TAIL_CHARACTERS = 3000
"""Largest number of characters of a log or an output that an error message quotes."""


class StartFailed(FalajError):
    """A part of the cluster did not start."""


def environment(config: PlatformConfig, record: ClusterRecord) -> dict[str, str]:
    """Return the environment of every process of the cluster. Jobs and replicas inherit it."""
    unset = {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
    if os.environ.get(processes.ID_VARIABLE) == record.instance:
        # The cluster itself set this variable, perhaps in a repair that was started without the option for GPUs.
        unset |= {"DS_ACCELERATOR"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    first_port = config.cluster.ports.replicas
    first_grpc_port = first_port + NUM_REPLICA_PORTS // 2
    return inherited | {
        processes.ID_VARIABLE: record.instance,
        ROOT_VARIABLE: record.project_root,
        RECORD_VARIABLE: record_path(config.storage),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": record.token_path,
        "RAY_USAGE_STATS_ENABLED": "0",
        **network_environment(record.address),
        **tls_environment(record.layout, on=record.tls),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_apps.replica.direct.middlewares",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_grpc_port - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first_grpc_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first_port + NUM_REPLICA_PORTS - 1),
        # By default, Ray starts its workers with niceness 15, and replicas are workers. Any other process on the same
        # core, such as the dashboard, would get 28 times the CPU time of a replica.
        "RAY_worker_niceness": "0",
        **_gcs_environment(config, record),
        "RAY_TRAIN_V2_ENABLED": "1",
        "NML_DISABLE_USAGE_LOGGING": "1",
        **({} if config.cluster.num_gpus else {"DS_ACCELERATOR": "cpu"}),
    }


def _gcs_environment(config: PlatformConfig, record: ClusterRecord) -> dict[str, str]:
    """Let the head's GCS keep its state, so that it can be restarted while everything else keeps running."""
    in_redis = config.cluster.gcs.url is not None
    waits = (
        {"RAY_gcs_rpc_server_reconnect_timeout_s": str(HEADLESS_S)} if record.has_nodes or in_redis else {}
    )
    if record.node_id is not None:
        return waits
    if in_redis:
        return {"RAY_gcs_storage": "redis", **waits}
    return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(gcs_folder(record)), **waits}


def start_ray(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start the head node's daemons.

    Raises:
        StartFailed: Ray did not start. The message has Ray's output.
    """
    print("starting the Ray head", flush=True)
    ports = record.ports
    Path(record.temp_dir).mkdir(mode=0o700, exist_ok=True)
    command = [
        *START_RAY,
        "--head",
        "--dashboard-host=127.0.0.1",
        "--include-dashboard=true",
        f"--port={ports['gcs']}",
        f"--ray-client-server-port={ports['ray_client']}",
        f"--dashboard-port={ports['dashboard']}",
        f"--metrics-export-port={ports['ray_metrics']}",
        *_ray_options(config, record),
    ]
    gcs = config.cluster.gcs
    variables = {} if gcs.url is None else gcs_store.ray_environment(gcs, record)
    failure = "Ray did not start"
    run_command(command, config, record, failure=failure, timeout_s=RAY_START_S, variables=variables)


def start_ray_node(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start the daemons of a node that joined.

    Raises:
        StartFailed: Ray did not start. The message has Ray's output.
    """
    print("starting Ray", flush=True)
    Path(record.temp_dir).mkdir(mode=0o700, exist_ok=True)
    command = [
        *START_RAY,
        f"--address={record.ray_address}",
        f"--metrics-export-port={record.ports['ray_metrics']}",
        *_ray_options(config, record),
    ]
    run_command(command, config, record, failure="Ray did not start", timeout_s=RAY_START_S)


def _ray_options(config: PlatformConfig, record: ClusterRecord) -> list[str]:
    """Return the options of `ray start` on every node.

    The raylet need not wait for its agents if it knows their ports (`cluster/node/ray_start.py`).
    """
    listen, grpc, runtime_env = processes.free_ports(3, record.address)
    options = [
        "--disable-usage-stats",
        f"--node-ip-address={record.address}",
        f"--dashboard-agent-listen-port={listen}",
        f"--dashboard-agent-grpc-port={grpc}",
        f"--runtime-env-agent-port={runtime_env}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--num-cpus={config.cluster.num_cpus}",
        f"--num-gpus={config.cluster.num_gpus}",
        f"--object-store-memory={config.cluster.object_store_mib * 2**20}",
        f"--labels=ray.io/availability-region={config.cluster.region}",
        f"--temp-dir={record.temp_dir}",
    ]
    if config.cluster.spill_folder is not None:
        options.append(f"--object-spilling-directory={resolve(config.cluster.spill_folder)}")
    return options


def start_serve(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start Serve's controller in throughput mode, and the applications that belong to no model.

    This runs in a separate process, because a process that attaches to Ray stays a Ray driver until it ends.

    Raises:
        StartFailed: Serve did not start. The message has the command's output.
    """
    print("starting Serve, with features and outcomes", flush=True)
    command = [sys.executable, "-m", "serve_apps.shared_apps", *cluster_overrides(config, record)]
    output = run_command(command, config, record, failure="Serve did not start", timeout_s=RAY_START_S)
    print(output, end="", flush=True)


def run_command(
    command: list[str],
    config: PlatformConfig,
    record: ClusterRecord,
    *,
    failure: str,
    timeout_s: float,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run a command in the cluster's environment, wait until it ends, and return its output.

    Args:
        command: Program and arguments.
        config, record: Cluster whose environment the command gets.
        failure: Beginning of the error message, such as "Ray did not start".
        timeout_s: Timeout in seconds.
        variables: Further environment variables.

    Raises:
        StartFailed: The command failed or timed out.
    """
    try:
        result = subprocess.run(
            command,
            env=environment(config, record) | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            cwd=record.project_root,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise StartFailed(f"{failure} within {timeout_s:.0f} s.") from error
    output = result.stdout + result.stderr
    if result.returncode:
        raise StartFailed(f"{failure}:\n{output[-LOG_TAIL_CHARACTERS:]}")
    return output


def gcs_folder(record: ClusterRecord) -> Path:
    """Return the folder of the state of Ray's GCS."""
    return Path(record.gcs_dir or f"{record.runtime_folder}/gcs")


def new_gcs_folder(cluster_id: str) -> str:
    """Return the path of the GCS's folder for a new cluster.

    The folder is in memory if there is room, because the GCS's state is useless after a reboot.
    """
    runtime = processes.runtime_dir(cluster_id)
    folder = memory_folder(otherwise=Path(runtime))
    return f"{runtime}/gcs" if str(folder) == runtime else f"{folder}/gcs-{cluster_id}"


def end_all(record: ClusterRecord) -> int:
    """End all processes of a cluster, and return their number.

    The supervisor ends first, because it would restart the other processes.
    """
    supervisor = find_parts(record).get(Part.supervisor)
    if supervisor is not None:
        processes.end_process(supervisor, grace_s=SUPERVISOR_GRACE_S)
    return processes.end(record.instance, owner=record.owner) + (supervisor is not None)


def remove_folders(record: ClusterRecord) -> None:
    """Remove the cluster's folders outside the storage root."""
    shutil.rmtree(record.runtime_folder, ignore_errors=True)
    shutil.rmtree(gcs_folder(record), ignore_errors=True)


def start_process(
    config: PlatformConfig, record: ClusterRecord, module: str, *, log: Path
) -> subprocess.Popen[bytes]:
    """Start a long-running Falaj process in the background, with the cluster's configuration."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", module, *cluster_overrides(config, record)],
            umask=0o077,
            env=environment(config, record),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            cwd=record.project_root,
        )


def cluster_overrides(config: PlatformConfig, record: ClusterRecord) -> Sequence[str]:
    """Return the recorded configuration of a cluster as command-line arguments.

    Records of earlier releases do not contain it; then it is built from `config`.
    """
    return shared_overrides(config, record) if record.overrides is None else record.overrides


def shared_overrides(config: PlatformConfig, record: ClusterRecord) -> list[str]:
    """Return the configuration that all processes of a cluster share, as command-line arguments.

    Every user of the machine can read command lines, so no section may contain a secret.
    """
    return [
        *overrides("storage.root", record.storage_root),
        *overrides("storage.local", record.local_root),
        *overrides("storage.upload_after_s", config.storage.upload_after_s),
        f"tier={config.tier.value}",
        *overrides("cluster", config.cluster),
        *overrides("identity", config.identity, leave_out=USER_FIELDS),
        *(
            argument
            for section in (
                "secrets",
                "ledger",
                "online",
                "features",
                "scaling",
                "replica",
                "jobs",
                "rollouts",
            )
            for argument in overrides(section, getattr(config, section))
        ),
    ]


def overrides(name: str, value: Any, *, leave_out: Collection[str] = ()) -> list[str]:
    """Return command-line arguments that set every field of a configuration section, except fields that are None.

    Args:
        name: Dotted name of the section.
        value: The section's dataclass, or the value of one field.
        leave_out: Names of fields to leave out.
    """
    if is_dataclass(value):
        return [
            argument
            for field in fields(value)
            if field.name not in leave_out
            for argument in overrides(f"{name}.{field.name}", getattr(value, field.name))
        ]
    if value is None:
        return []
    if isinstance(value, list):
        return [f"++{name}=[{','.join(map(quoted, value))}]"]
    return [f"++{name}={quoted(value)}"]


def wait_until(process: subprocess.Popen[bytes], ready: Callable[[], bool], *, name: str, log: Path) -> None:
    """Wait until a process is ready.

    Raises:
        StartFailed: The process ended, or was not ready in time. The message has the end of its log.
    """
    deadline = time.monotonic() + START_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        if ready():
            return
        time.sleep(0.1)
    raise StartFailed(
        f"The {name} did not start; the end of {log}:\n{log.read_text(errors='replace')[-LOG_TAIL_CHARACTERS:]}"
    )


def edge_log(config: PlatformConfig) -> Path:
    """Return the path of the edge controller's log."""
    return local(layout(config.storage).edge) / "controller.log"


def nodes_log(config: PlatformConfig) -> Path:
    """Return the path of the log of the service for nodes."""
    return local(layout(config.storage).keys) / "nodes.log"


def key_log(config: PlatformConfig) -> Path:
    """Return the path of the key broker's log."""
    return local(layout(config.storage).keys) / "broker.log"


def supervisor_log(config: PlatformConfig) -> Path:
    """Return the path of the supervisor's log."""
    return local(layout(config.storage).edge) / "supervisor.log"


def scheduler_log(config: PlatformConfig) -> Path:
    """Return the path of the scheduler's log."""
    return local(layout(config.storage).edge) / "scheduler.log"


def jobs_log(config: PlatformConfig) -> Path:
    """Return the path of the log of the service for submitted jobs."""
    return local(layout(config.storage).edge) / "jobs.log"


def rollouts_log(config: PlatformConfig) -> Path:
    """Return the path of the log of the controller of rollouts."""
    return local(layout(config.storage).edge) / "rollouts.log"


def uploader_log(config: PlatformConfig) -> Path:
    """Return the path of the log uploader's log."""
    return local(layout(config.storage).edge) / "uploader.log"


def answers_http(url: str) -> bool:
    """Return whether a GET request succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
