"""Versions that a rollout took out of use: until when they stay deployed, what that costs, and which must end.

The ledger decides: `DeploymentRemoved` by the controller says that an application must end, and nothing starts it
again. Then the head ends it in Serve, and `ApplicationEnded` says that this is done. A kill in between loses nothing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import ApplicationEnded, DeploymentRemoved
from serve_apps.rollout.history import History, Warm
from serve_apps.rollout.serving_state import ModelState, States
from serve_apps.rollout.transitions import ACTOR


def due(model: str, history: History, state: ModelState, now: dt.datetime) -> list[DeploymentRemoved]:
    """Return the events that remove a model's versions whose time is over and that get no request."""
    return [
        DeploymentRemoved(
            name=model,
            version=one.version,
            app=state.apps[one.version],
            reason=f"the rollback window of rollout {one.rollout} is over",
        )
        for one in history.warm
        if now >= dt.datetime.fromisoformat(one.until) and _is_unused(one.version, state)
    ]


def _is_unused(version: int, state: ModelState) -> bool:
    is_watched = state.watch is not None and state.watch.predecessor == version
    return version in state.apps and not is_watched and state.usage_of(version) is None


def warm_status(history: History, state: ModelState, cost: Callable[[str], Mapping[str, Any]]) -> list[Any]:
    """Return the versions that stay deployed, for `action=show`.

    Args:
        history, state: The model's.
        cost: Returns the resources that an application holds without requests.
    """
    return [
        _shown(one, dict(cost(state.apps[one.version]))) for one in history.warm if one.version in state.apps
    ]


def _shown(one: Warm, cost: dict[str, Any]) -> dict[str, Any]:
    return {"version": one.version, "rollout": one.rollout, "until": one.until, "cost": cost}


@dataclass(kw_only=True, slots=True)
class OpenRemovals:
    """The removals by the controller whose applications have not ended yet. It reads only new events."""

    ledger: Ledger
    _read_until: int = 0
    _open: dict[int, Entry] | None = None

    def entries(self, states: Callable[[], States]) -> Iterator[Entry]:
        """Yield the open `DeploymentRemoved` events, without versions that were deployed again.

        Args:
            states: Returns the serving states now.
        """
        self._read()
        for entry in (self._open or {}).values():
            state = states().get(str(entry.payload["name"]), ModelState())
            if entry.payload["version"] not in state.apps:
                yield entry

    def _read(self) -> None:
        head = self.ledger.head()
        if head == self._read_until:
            return
        found = {} if self._open is None else self._open
        for entry in self.ledger.entries(DeploymentRemoved, after=self._read_until):
            if entry.actor == ACTOR:
                found[entry.seq] = entry
        for entry in self.ledger.entries(ApplicationEnded, after=self._read_until):
            found.pop(int(entry.payload["removed_seq"]), None)
        self._open, self._read_until = found, head
