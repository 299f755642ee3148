"""Ray's daemons, each started again by the command line that `ray start` gave it.

Ray has no command for that. The GCS finds what it knew in its store (`gcs_folder`); the raylet, the replicas and all
else that runs reconnect to it and lose nothing, if it is back within a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster import processes
from cluster.node.launch import gcs_folder
from cluster.node.parts import RAYS_OWN, Part, sort_out
from cluster.security.private_folder import private_folder
from cluster.session import ClusterRecord
from cluster.storage import write_bytes

ALL_THERE_S = 10.0
_NOT_KEPT = "RAY_AUTH_TOKEN"


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """How a daemon was started."""

    argv: list[str]
    variables: dict[str, str]
    """Ray's own variables."""
    cwd: str


def keep_commands(record: ClusterRecord) -> None:
    """Write down how Ray's daemons were started, once they all run; the last two come a little later than the head."""
    deadline = time.monotonic() + ALL_THERE_S
    while True:
        there = sort_out(processes.find(record.cluster_id, owner=record.owner))
        if all(part in there for part in RAYS_OWN) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    found = {part.name: asdict(_command(there[part])) for part in RAYS_OWN if part in there}
    write_bytes(str(_file(record)), json.dumps(found).encode())


def forget_commands(record: ClusterRecord) -> None:
    """Those of a head that is lost start nothing of the next one."""
    _file(record).unlink(missing_ok=True)


def start_again(record: ClusterRecord, part: Part, environment: dict[str, str], *, log: Path) -> bool:
    """Start a daemon; gives whether it is known how.

    Raises:
        ConfigError: another user could have changed what is run, or what the GCS knows.
        OSError: no process could be started.
    """
    private_folder(Path(record.runtime_folder))
    private_folder(gcs_folder(record).parent)
    try:
        kept = json.loads(_file(record).read_text()).get(part.name)
    except (OSError, ValueError):
        kept = None
    if kept is None:
        return False
    command = Command(**kept)
    with log.open("ab") as sink:
        subprocess.Popen(
            command.argv,
            env=environment | command.variables,
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
        if name.startswith("RAY_") and name != _NOT_KEPT
    }
    return Command(argv=process.cmdline(), variables=variables, cwd=process.cwd() or os.getcwd())


def _file(record: ClusterRecord) -> Path:
    return Path(record.runtime_folder) / "daemons.json"
