"""Replace a lost Ray head, and restore the applications that should serve according to the ledger.

If other nodes have joined, the new head first continues with the state of Ray's GCS on the disk. So the other nodes and
their replicas stay, and their edges answer. If Ray does not start with this state, the next try starts with an empty
state, and the other nodes start Ray again.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import psutil

from cluster.errors import ConfigError
from cluster.host import processes
from cluster.node.launch import (
    StartFailed,
    cluster_overrides,
    gcs_folder,
    run_command,
    start_ray,
    start_serve,
)
from cluster.node.parts import RAY_PARTS, part_of
from cluster.security.private_folder import ensure_private_folder
from cluster.security.tokens.intent import mint_intent, write_intent
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig
from cluster.storage import local, resolve
from cluster.supervisor.daemons import remove_commands, save_commands

ACTOR = "system:supervisor"
RESTORE_MODULE = "serve_apps.deploy"
RESTORE_TIMEOUT_S = 900.0
GRACE_S = 1.0


def restore_is_due(record: ClusterRecord) -> bool:
    """Return whether applications of a lost head still wait to be restored."""
    return _marker(record).exists()


def request_restore(record: ClusterRecord) -> None:
    """Let the supervisor restore the applications that should serve according to the ledger."""
    _marker(record).touch()


def mark_restored(record: ClusterRecord) -> None:
    """Record that all applications are restored, by the supervisor or by an operator."""
    _marker(record).unlink(missing_ok=True)


def replace_head(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start a new head in place of a lost head. If the GCS's state is in Redis, the nodes and their replicas stay.

    It first writes a marker file. So `restore_is_due` is true until all applications are restored, even if this process
    is killed.

    Raises:
        StartFailed: Ray or Serve did not start.
        ConfigError: Another user can change the cluster's folders.
        OSError: A file or process could not be created.
    """
    ensure_private_folder(Path(record.runtime_folder))
    ensure_private_folder(gcs_folder(record).parent)
    request_restore(record)
    remove_commands(record)
    processes.end(record.instance, owner=record.owner, only=belongs_to_ray, grace_s=GRACE_S)
    in_redis, marker = config.cluster.gcs.url is not None, _resumption_marker(record)
    has_state = record.has_nodes and gcs_folder(record).exists()
    if resumes(in_redis=in_redis, has_state=has_state, was_tried=marker.exists()):
        if not in_redis:
            marker.touch()
        _remove_session_files(Path(record.temp_dir))
    else:
        shutil.rmtree(gcs_folder(record), ignore_errors=True)
    try:
        start_ray(config, record)
    except StartFailed as error:
        if not in_redis:
            raise
        raise StartFailed(
            f"{error}\nIf this repeats, Ray's state in Redis may be damaged: `python -m cluster.down` removes it, and "
            "`python -m cluster.up` then starts a new cluster."
        ) from error
    marker.unlink(missing_ok=True)  # otherwise the state would be discarded after a later loss
    try:
        start_serve(config, record)
    finally:  # if Serve did not start, the head stays, and `restore` tries again
        save_commands(record)


def resumes(*, in_redis: bool, has_state: bool, was_tried: bool) -> bool:
    """Return whether a new head continues with the state of the lost one, and does not start with an empty state.

    Args:
        in_redis: whether the state is in Redis. Then only `cluster.down` removes it.
        has_state: whether the head of several nodes has state on its disk.
        was_tried: whether Ray has not started with that state.
    """
    return in_redis or (has_state and not was_tried)


def _remove_session_files(temp_dir: Path) -> None:
    """Remove what keeps Ray from starting again in the session of a lost head: its address and its sockets."""
    (temp_dir / "ray_current_cluster").unlink(missing_ok=True)
    shutil.rmtree(temp_dir / "session_latest" / "sockets", ignore_errors=True)


def restore(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start the applications that should serve according to the ledger, as `system:supervisor`.

    Raises:
        StartFailed: Not every application started. The message has the command's output.
        ConfigError: An OIDC issuer is configured, and `identity.supervisor_token_file` is not set.
    """
    _resumption_marker(record).unlink(
        missing_ok=True
    )  # a supervisor that was killed during the start leaves it
    token = supervisor_intent(config, record)
    command = [
        *(sys.executable, "-m", RESTORE_MODULE, "action=restore", "as_deployed=true"),
        *(f"++identity.token_file='{token}'", *cluster_overrides(config, record)),
    ]
    failure = "The applications were not restored"
    run_command(command, config, record, failure=failure, timeout_s=RESTORE_TIMEOUT_S)


def supervisor_intent(config: PlatformConfig, record: ClusterRecord) -> Path:
    """Return the file with the supervisor's intent. The intent allows only the restore command.

    Raises:
        ConfigError: An OIDC issuer is configured, and `identity.supervisor_token_file` is not set.
    """
    if config.identity.supervisor_token_file is not None:
        return Path(resolve(config.identity.supervisor_token_file))
    if config.identity.issuer.url is not None:
        raise ConfigError(
            "The lost applications cannot be restored: identity.supervisor_token_file names no file with an intent of "
            f"{config.identity.issuer.url} for '{RESTORE_MODULE}' and the role supervisor. Set it, or restore them "
            f"yourself with `python -m {RESTORE_MODULE} action=restore`."
        )
    storage = record.layout
    principal = Principal(subject=ACTOR, role=Role.supervisor, purpose="", expires_at=int(time.time()))
    folder = local(storage.keys) / "intents"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "supervisor.jwt"
    intent = mint_intent(storage, principal, entrypoint=RESTORE_MODULE, ttl_s=int(RESTORE_TIMEOUT_S))
    write_intent(path, intent)
    return path


def belongs_to_ray(process: psutil.Process) -> bool:
    """Return whether a process of the cluster belongs to Ray: neither to Falaj itself nor to HAProxy."""
    part = part_of(process.name(), process.cmdline())
    return part in RAY_PARTS if part is not None else process.name() != "haproxy"


def _marker(record: ClusterRecord) -> Path:
    return Path(record.runtime_folder) / "restore-due"


def _resumption_marker(record: ClusterRecord) -> Path:
    """Return the file that exists while a new head starts with the state of the lost one."""
    return Path(record.runtime_folder) / "resuming"
