"""Starting the processes of a cluster: what `cluster.up` does once, and the supervisor again and again."""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from cluster import processes
from cluster.errors import FalajError
from cluster.node.parts import Part, sort_out
from cluster.security.encryption.scratch import memory_folder
from cluster.session import LOOPBACK, RECORD_VARIABLE, ClusterRecord, record_path, tls_environment
from cluster.settings import PlatformConfig
from cluster.storage import ROOT_VARIABLE, layout, local, resolve

START_DEADLINE_S = 60.0
RAY_START_S = 180.0
SUPERVISOR_GRACE_S = 5.0
NUM_REPLICA_PORTS = 1000
JOBS_OWN = ("token_file", "role", "purpose")
"""Fields of the identity that are those of the person who runs a command, and of no process of the cluster."""


class StartFailed(FalajError):
    """A part of the cluster did not start."""


def environment(config: PlatformConfig, record: ClusterRecord) -> dict[str, str]:
    """The environment of every process of the cluster, and so of every job and replica."""
    unset = {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
    if os.environ.get(processes.ID_VARIABLE) == record.cluster_id:
        # Ours, and perhaps of a repair that was not told of the GPUs.
        unset |= {"DS_ACCELERATOR"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    first = config.cluster.ports.replicas
    return inherited | {
        processes.ID_VARIABLE: record.cluster_id,
        ROOT_VARIABLE: record.project_root,
        RECORD_VARIABLE: record_path(config.storage),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": record.token_path,
        "RAY_USAGE_STATS_ENABLED": "0",
        **LOOPBACK,
        **tls_environment(record.storage_root, on=record.tls),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_apps.replica.direct.middlewares",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + NUM_REPLICA_PORTS // 2 - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first + NUM_REPLICA_PORTS // 2),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + NUM_REPLICA_PORTS - 1),
        # Ray starts its workers at niceness 15, and a replica is one: whatever else has something to do on its core,
        # the dashboard say, gets 28 times its share. Requests are no background work.
        "RAY_worker_niceness": "0",
        # What the GCS knows outlives its process, so that it can be started again while everything else runs on.
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(gcs_folder(record)),
        "RAY_TRAIN_V2_ENABLED": "1",
        "NML_DISABLE_USAGE_LOGGING": "1",
        **({} if config.cluster.num_gpus else {"DS_ACCELERATOR": "cpu"}),
    }


def start_ray(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start the head node's daemons.

    Raises:
        StartFailed: with what Ray said.
    """
    print("starting the Ray head", flush=True)
    ports = record.ports
    Path(record.temp_dir).mkdir(mode=0o700, exist_ok=True)
    command = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--disable-usage-stats",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--include-dashboard=true",
        f"--port={ports['gcs']}",
        f"--ray-client-server-port={ports['ray_client']}",
        f"--dashboard-port={ports['dashboard']}",
        f"--metrics-export-port={ports['ray_metrics']}",
        "--dashboard-agent-listen-port=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--num-cpus={config.cluster.num_cpus}",
        f"--num-gpus={config.cluster.num_gpus}",
        f"--object-store-memory={config.cluster.object_store_mib * 2**20}",
        f"--labels=ray.io/availability-region={config.cluster.region}",
        f"--temp-dir={record.temp_dir}",
    ]
    if config.cluster.spill_folder is not None:
        command.append(f"--object-spilling-directory={resolve(config.cluster.spill_folder)}")
    _run(command, config, record, what="Ray")


def start_serve(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start Serve's controller in throughput mode, and the applications that belong to no model.

    It is a process of its own, because whoever attaches to Ray stays its driver until it ends.

    Raises:
        StartFailed: with what it said.
    """
    print("starting Serve, with features and outcomes", flush=True)
    command = [sys.executable, "-m", "serve_apps.common", *started_with(config, record)]
    print(_run(command, config, record, what="Serve"), end="", flush=True)


def _run(command: list[str], config: PlatformConfig, record: ClusterRecord, *, what: str) -> str:
    """Run a command that ends when something has started; gives what it said."""
    try:
        result = subprocess.run(
            command,
            env=environment(config, record),
            capture_output=True,
            text=True,
            check=False,
            cwd=record.project_root,
            timeout=RAY_START_S,
        )
    except subprocess.TimeoutExpired as error:
        raise StartFailed(f"{what} did not start within {RAY_START_S:.0f} s.") from error
    if result.returncode:
        raise StartFailed(f"{what} did not start:\n{(result.stdout + result.stderr)[-3000:]}")
    return result.stdout + result.stderr


def gcs_folder(record: ClusterRecord) -> Path:
    """Where Ray's GCS keeps what it knows."""
    return Path(record.gcs_dir or f"{record.runtime_folder}/gcs")


def new_gcs_folder(cluster_id: str) -> str:
    """In memory where there is room, because nothing of it outlives the machine."""
    runtime = processes.runtime_dir(cluster_id)
    folder = memory_folder(otherwise=Path(runtime))
    return f"{runtime}/gcs" if str(folder) == runtime else f"{folder}/gcs-{cluster_id}"


def end_all(record: ClusterRecord) -> int:
    """End a cluster's processes, the supervisor first, or it would start the others again; gives their number."""
    there = sort_out(processes.find(record.cluster_id, owner=record.owner))
    watching = there.get(Part.supervisor)
    if watching is not None:
        processes.end_one(watching, grace_s=SUPERVISOR_GRACE_S)
    return processes.end(record.cluster_id, owner=record.owner) + (watching is not None)


def remove_folders(record: ClusterRecord) -> None:
    """Remove what lies outside the storage root."""
    shutil.rmtree(record.runtime_folder, ignore_errors=True)
    shutil.rmtree(gcs_folder(record), ignore_errors=True)


def start_process(
    config: PlatformConfig, record: ClusterRecord, module: str, *, log: Path
) -> subprocess.Popen[bytes]:
    """Start one of our own long-running processes, with the configuration that it shares with the cluster."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", module, *started_with(config, record)],
            umask=0o077,
            env=environment(config, record),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            cwd=record.project_root,
        )


def started_with(config: PlatformConfig, record: ClusterRecord) -> Sequence[str]:
    """The configuration that the cluster was started with, as words of a command line."""
    return shared_overrides(config, record) if record.overrides is None else record.overrides


def shared_overrides(config: PlatformConfig, record: ClusterRecord) -> list[str]:
    """What the cluster's own processes are configured with like itself, as words of a command line. Everybody on the
    machine can read them, so no section may hold a secret."""
    return [
        f"storage.root={record.storage_root}",
        f"tier={config.tier.value}",
        *overrides("cluster", config.cluster),
        *overrides("identity", config.identity, leave_out=JOBS_OWN),
        *(
            word
            for section in ("secrets", "ledger", "online", "features", "scaling", "replica")
            for word in overrides(section, getattr(config, section))
        ),
    ]


def overrides(name: str, value: Any, *, leave_out: Collection[str] = ()) -> list[str]:
    """A section as words of a command line that set it, whatever is composed there; what is none is left out."""
    if is_dataclass(value):
        return [
            word
            for each in fields(value)
            if each.name not in leave_out
            for word in overrides(f"{name}.{each.name}", getattr(value, each.name))
        ]
    if value is None:
        return []
    text = str(value.value if isinstance(value, enum.Enum) else value).replace("'", "\\'")
    return [f"++{name}='{text}'"]


def wait_until(process: subprocess.Popen[bytes], ready: Callable[[], bool], *, name: str, log: Path) -> None:
    """Wait until a process serves.

    Raises:
        StartFailed: with the end of its log.
    """
    deadline = time.monotonic() + START_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        if ready():
            return
        time.sleep(0.1)
    raise StartFailed(
        f"The {name} did not start; the end of {log}:\n{log.read_text(errors='replace')[-3000:]}"
    )


def edge_log(config: PlatformConfig) -> Path:
    """Where the edge's controller writes."""
    return local(layout(config.storage).edge) / "controller.log"


def key_log(config: PlatformConfig) -> Path:
    """Where the key broker writes."""
    return local(layout(config.storage).keys) / "broker.log"


def supervisor_log(config: PlatformConfig) -> Path:
    """Where the supervisor writes."""
    return local(layout(config.storage).edge) / "supervisor.log"


def answers_http(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
