"""State of the running edge, in a file. Commands read the file to wait until the edge has applied a change."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import FalajError
from cluster.settings import PlatformConfig
from cluster.storage import layout, local
from serve_apps.edge.control.files import replace_file

POLL_S = 0.005
DEADLINE_S = 30.0


class EdgeTimeout(FalajError):
    """The edge did not apply a change in time."""


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


def write_state(path: Path, state: EdgeState) -> None:
    """Replace the state file."""
    replace_file(path, json.dumps(asdict(state)).encode())


def wait_until_applied(config: PlatformConfig, seq: int, *, app: str | None = None) -> None:
    """Wait until the edge has applied an event, and has a backend for the application.

    Raises:
        EdgeTimeout: after 30 s.
    """
    path, deadline = state_file(config), time.monotonic() + DEADLINE_S
    state = None
    while time.monotonic() < deadline:
        if path.exists():
            state = EdgeState(**json.loads(path.read_text()))
            if state.applied_seq >= seq and (app is None or app in state.backends):
                return
        time.sleep(POLL_S)
    refused = f" {state.refused}" if state and state.refused else ""
    raise EdgeTimeout(
        f"The edge did not apply event {seq} within {DEADLINE_S:.0f} s. See {path.parent}/controller.log.{refused}"
    )
