"""How a command waits until its change is in effect at every live edge."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from cluster.errors import FalajError
from cluster.ledger import Ledger
from cluster.ledger.database import is_shared
from cluster.settings import PlatformConfig
from serve_apps.edge.control.edge_state import EdgeState, state_file
from serve_apps.edge.control.live_edges import LIVE_S, ReportedEdge, ensure_table, read_edges

POLL_S = 0.005
DEADLINE_S = 30.0


class EdgeTimeout(FalajError):
    """An edge did not apply a change in time."""


def wait_until_applied(config: PlatformConfig, ledger: Ledger, seq: int, *, app: str | None = None) -> None:
    """Wait until every live edge has applied an event, and has an application among its backends.

    An edge that stopped reporting is not waited for; a warning on standard error names it.

    Raises:
        EdgeTimeout: after 30 s; the message names the edges that did not apply the event.
    """
    if is_shared(ledger.engine):
        _wait_for_table(ledger, seq, app)
    else:
        _wait_for_file(state_file(config), seq, app)


def _wait_for_file(path: Path, seq: int, app: str | None) -> None:
    deadline = time.monotonic() + DEADLINE_S
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


def _wait_for_table(ledger: Ledger, seq: int, app: str | None) -> None:
    ensure_table(ledger)
    deadline = time.monotonic() + DEADLINE_S
    waiting: list[ReportedEdge] = []
    with ledger.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while time.monotonic() < deadline:
            edges = read_edges(connection, app=app)
            live = [edge for edge in edges if edge.is_live]
            waiting = [edge for edge in live if edge.applied_seq < seq or not edge.has_app]
            if live and not waiting:
                _warn_of([edge for edge in edges if not edge.is_live])
                return
            time.sleep(POLL_S)
    raise EdgeTimeout(_timeout_message(waiting, seq))


def _timeout_message(waiting: list[ReportedEdge], seq: int) -> str:
    if not waiting:
        return (
            f"No edge has reported within {LIVE_S:.0f} s, so event {seq} is not in effect. See edge/controller.log on "
            "the machine of each edge, and `python -m cluster.status`."
        )
    names = ", ".join(edge.address for edge in waiting)
    reasons = "".join(f" {edge.refused}" for edge in waiting if edge.refused)
    return (
        f"These edges did not apply event {seq} within {DEADLINE_S:.0f} s: {names}. See edge/controller.log on their "
        f"machines.{reasons}"
    )


def _warn_of(silent: list[ReportedEdge]) -> None:
    """Name the edges that do not report: if only their network to the database is cut, they serve an earlier state."""
    for edge in silent:
        print(
            f"warning: edge {edge.address} has not reported for {edge.age_s:.0f} s. If it still serves, it uses an "
            "earlier state.",
            file=sys.stderr,
        )
