"""State of the running edge, in a file. With SQLite, commands read it to wait until the edge has applied a change."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.settings import PlatformConfig
from cluster.storage import layout, local
from serve_apps.edge.control.files import replace_file


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeState:
    """State of the running HAProxy. The fields are the keys of the JSON file."""

    applied_seq: int
    """Sequence number of the last event that was applied to the running map."""
    backends: list[str]
    pid: int | None
    refused: str = ""
    """Why HAProxy refuses the newest configuration and uses an older one; empty if it uses the newest."""


def state_file(config: PlatformConfig) -> Path:
    """Return the path of the controller's state file."""
    return local(layout(config.storage).edge) / "state.json"


def read_state(path: Path) -> EdgeState:
    """Return the stored state; without a valid file, that of an edge that has applied nothing."""
    try:
        return EdgeState(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return EdgeState(applied_seq=0, backends=[], pid=None)


def write_state(path: Path, state: EdgeState) -> None:
    """Replace the state file."""
    replace_file(path, json.dumps(asdict(state)).encode())
