"""Bringing back a Ray head that is lost as a whole, and all applications that the ledger says serve."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster import processes
from cluster.errors import ConfigError, FalajError
from cluster.node.launch import environment, gcs_folder, start_ray, start_serve, started_with
from cluster.node.parts import RAYS_OWN, part_of
from cluster.security.private_folder import private_folder
from cluster.security.tokens.intent import mint_intent, write_intent
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig
from cluster.storage import Layout, local, resolve
from cluster.supervisor.daemons import forget_commands, keep_commands

ACTOR = "system:supervisor"
RESTORE = "serve_apps.deploy"
RESTORE_S = 900.0
GRACE_S = 1.0


class RestoreFailed(FalajError):
    """Not every application came back."""


def restore_is_due(record: ClusterRecord) -> bool:
    """Whether a head was lost whose applications have not been restored yet."""
    return _marker(record).exists()


def restored(record: ClusterRecord) -> None:
    """Note that all applications are back, whoever restored them."""
    _marker(record).unlink(missing_ok=True)


def bring_back(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start a new head in the place of one that is lost. Until `restore` has succeeded that is due, whoever is killed.

    Raises:
        StartFailed, ConfigError, OSError
    """
    private_folder(Path(record.runtime_folder))
    private_folder(gcs_folder(record).parent)
    _marker(record).touch()
    forget_commands(record)
    processes.end(record.cluster_id, owner=record.owner, only=_is_rays, grace_s=GRACE_S)
    shutil.rmtree(gcs_folder(record), ignore_errors=True)
    start_ray(config, record)
    try:
        start_serve(config, record)
    finally:  # a head without Serve stays, and `restore` tries again
        keep_commands(record)


def restore(config: PlatformConfig, record: ClusterRecord) -> None:
    """Have the applications started that the ledger says serve, as `system:supervisor`.

    Raises:
        RestoreFailed: with what the command said.
        ConfigError: another issuer than the dev issuer is believed, and no file holds an intent of it.
    """
    token = supervisor_intent(config, record)
    try:
        result = subprocess.run(
            [
                *(sys.executable, "-m", RESTORE, "action=restore", "as_deployed=true"),
                *(f"++identity.token_file='{token}'", *started_with(config, record)),
            ],
            env=environment(config, record),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            cwd=record.project_root,
            timeout=RESTORE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise RestoreFailed(f"The applications did not come back within {RESTORE_S:.0f} s.") from error
    if result.returncode:
        raise RestoreFailed((result.stdout + result.stderr)[-3000:])


def supervisor_intent(config: PlatformConfig, record: ClusterRecord) -> Path:
    """A file with the supervisor's intent to restore, and to do nothing else."""
    if config.identity.supervisor_token_file is not None:
        return Path(resolve(config.identity.supervisor_token_file))
    if config.identity.issuer.url is not None:
        raise ConfigError(
            "The lost applications cannot be restored: identity.supervisor_token_file names no file with an intent of "
            f"{config.identity.issuer.url} for '{RESTORE}' and the role supervisor. Set it, or restore them yourself "
            f"with `python -m {RESTORE} action=restore`."
        )
    places = Layout(record.storage_root)
    me = Principal(subject=ACTOR, role=Role.supervisor, purpose="", expires_at=int(time.time()))
    folder = local(places.keys) / "intents"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "supervisor.jwt"
    write_intent(path, mint_intent(places, me, entrypoint=RESTORE, ttl_s=int(RESTORE_S)))
    return path


def _is_rays(process: psutil.Process) -> bool:
    """Whether a process of the cluster ends with Ray: all do but our own and HAProxy."""
    part = part_of(process.name(), process.cmdline())
    return part in RAYS_OWN if part is not None else process.name() != "haproxy"


def _marker(record: ClusterRecord) -> Path:
    return Path(record.runtime_folder) / "restore-due"
