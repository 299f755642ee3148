"""Restart Ray's daemons, each with the command line that `ray start` gave it.

Ray has no command for this. A restarted GCS loads its state from its folder (`gcs_folder`) or from Redis. If it runs
again within a minute, the raylet, the replicas and all other processes reconnect and lose nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.node.launch import gcs_folder
from cluster.node.parts import RAY_PARTS, Part, expected_parts, find_parts
from cluster.security.private_folder import ensure_private_folder
from cluster.session import ClusterRecord
from cluster.storage import write_bytes

ALL_RUNNING_TIMEOUT_S = 10.0
_NOT_SAVED = "RAY_AUTH_TOKEN"


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """Command line, Ray variables and working directory of a daemon."""

    argv: list[str]
    variables: dict[str, str]
    """Environment variables that start with `RAY_`."""
    cwd: str


def save_commands(record: ClusterRecord) -> None:
    """Wait until Ray's daemons run, then save their commands. The last two start a little later than the head."""
    deadline = time.monotonic() + ALL_RUNNING_TIMEOUT_S
    parts = [part for part in expected_parts(record) if part in RAY_PARTS]
    while True:
        running = find_parts(record)
        if all(part in running for part in parts) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    commands = {part.name: asdict(_command(running[part])) for part in parts if part in running}
    write_bytes(str(_file(record)), json.dumps(commands).encode())


def remove_commands(record: ClusterRecord) -> None:
    """Remove the saved commands. The commands of a lost head must not start daemons of the next head."""
    _file(record).unlink(missing_ok=True)


def restart_daemon(record: ClusterRecord, part: Part, environment: Mapping[str, str], *, log: Path) -> bool:
    """Start a daemon with its saved command, or return False if no command is saved.

    Args:
        record: The cluster.
        part: The daemon.
        environment: The cluster's environment variables, and the daemon's secrets, which are never saved.
        log: File for its output.

    Raises:
        ConfigError: Another user could have changed the command or the GCS's state.
        OSError: The process could not be started.
    """
    ensure_private_folder(Path(record.runtime_folder))
    ensure_private_folder(gcs_folder(record).parent)
    try:
        saved = json.loads(_file(record).read_text()).get(part.name)
    except (OSError, ValueError):
        saved = None
    if saved is None:
        return False
    command = Command(**saved)
    with log.open("ab") as sink:
        subprocess.Popen(
            command.argv,
            env=dict(environment) | command.variables,
            cwd=command.cwd,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    return True


def _command(process: psutil.Process) -> Command:
    variables = {
        name: value
        for name, value in process.environ().items()
        if name.startswith("RAY_") and name != _NOT_SAVED
    }
    return Command(argv=process.cmdline(), variables=variables, cwd=process.cwd() or os.getcwd())


def _file(record: ClusterRecord) -> Path:
    return Path(record.runtime_folder) / "daemons.json"
