"""What the edge's controller says of itself, for commands that wait until a change has arrived."""

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


class EdgeSilent(FalajError):
    """The edge did not take up a change in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeState:
    """What the running HAProxy has."""

    applied_seq: int
    """The last event whose effect is in the running map."""
    backends: list[str]
    pid: int | None
    refused: str = ""
    """Why HAProxy does not take the newest configuration, so that an older one stays; empty where it does."""


def state_file(config: PlatformConfig) -> Path:
    """Where the controller writes."""
    return local(layout(config.storage).edge) / "state.json"


def write_state(path: Path, state: EdgeState) -> None:
    """Write the state, whole."""
    replace_file(path, json.dumps(asdict(state)).encode())


def wait_until_applied(config: PlatformConfig, seq: int, *, app: str | None = None) -> None:
    """Wait until the edge has an event's effect, and an application among its backends.

    Raises:
        EdgeSilent: after 30 s.
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
    raise EdgeSilent(
        f"The edge did not take up event {seq} within {DEADLINE_S:.0f} s; see {path.parent}/controller.log.{refused}"
    )
