"""Rollbacks that this machine decided while the ledger did not answer, applied to what the ledger said last.

A journaled rollback removes its rollout, so all units go to the champion that the last known event names. It stays in
effect until the ledger itself says that the rollout has ended: the journal is emptied a moment before the edge reads
that event.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from cluster.errors import FalajError
from serve_apps.edge.control.haproxy_process import HAProxy
from serve_apps.edge.control.running_map import RunningMap
from serve_apps.edge.haproxy.routes import rollout_of, without_rollout
from serve_apps.rollout.outage.journal import Journal
from serve_apps.rollout.serving_state import States

LOG = logging.getLogger("falaj.edge")


class FollowedJournal:
    """The rollouts that a journal has rolled back."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._content = b""
        self._rollouts: frozenset[str] = frozenset()
        self._is_failing = False

    def without_rolled_back(self, states: States) -> States:
        """Return the states without the rollouts that are rolled back, and forget rollouts that have ended."""
        self._read()
        if not self._rollouts:
            return states
        running = {state.rollout.id: model for model, state in states.items() if state.rollout is not None}
        self._rollouts &= running.keys()
        models = [running[rollout] for rollout in self._rollouts]
        return states | {model: replace(states[model], rollout=None) for model in models}

    def apply_to_map(self, file: Path, haproxy: HAProxy) -> None:
        """Change a map that an earlier controller wrote. Use it while the ledger was not read yet.

        Raises:
            OSError: The map could not be changed. Call this again.
        """
        self._read()
        if not self._rollouts or not file.exists():
            return
        entries = dict(line.split(" ", 1) for line in file.read_text().splitlines() if " " in line)
        changed = {
            model: without_rollout(entry) if rollout_of(entry) in self._rollouts else entry
            for model, entry in entries.items()
        }
        if changed != entries:
            RunningMap(haproxy, file).update(changed)

    def _read(self) -> None:
        """Read the journal. If it cannot be read, what was read before stays."""
        try:
            content = self._journal.content()
            if content != self._content:
                found = frozenset(one.rollout for one in self._journal.parse(content))
                for rollout in found - self._rollouts:
                    LOG.warning("rollout %s is rolled back by this machine's journal", rollout)
                self._content, self._rollouts = content, self._rollouts | found
            self._is_failing = False
        except (OSError, FalajError, ValueError, TypeError) as error:
            if not self._is_failing:
                LOG.error("the journal of rollbacks cannot be read: %s", error)
            self._is_failing = True
