"""The supervisor's loop: look at every part once a second, and start again what does not run.

Nothing that goes wrong here ends it: what cannot be started is tried again, less and less often. It looks at processes
and not at children of its own, so that it can be killed and started at any moment, and what it watches lives on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import psutil

from cluster.node.parts import RAYS_OWN, Part, State, state_of
from cluster.supervisor.backoff import Backoff
from cluster.supervisor.metrics import SupervisorMetrics

STOPPED_S = 10.0
"""A part that was sent SIGSTOP is told to go on after this time."""
SILENT_S = 15.0
YOUNG_S = 60.0
"""A part that has just been started may not answer yet."""
REBUILD_LONGEST_S = 300.0
"""Of a head whose applications do not all come back: each try is a process, and an event."""
GCS_TRIES = 3
"""After so many the head is given up as a whole."""
PROBE_EVERY_S = 5.0
HEAD = "Ray head"
MINDED = (
    *(Part.broker, Part.edge, Part.haproxy, Part.gcs),
    *(Part.dashboard, Part.monitor, Part.log_monitor, Part.client_server),
)
LOG = logging.getLogger("falaj.supervisor")


class Machine(Protocol):
    """What the supervisor does to this machine."""

    def find(self) -> dict[Part, psutil.Process]:
        """The parts' processes, searched for among all."""

    def answers(self, part: Part) -> bool:
        """Whether a part that runs answers."""

    def start(self, part: Part) -> bool:
        """Start a part; gives whether it is known how. Raises where it cannot be started."""

    def kill(self, process: psutil.Process) -> None:
        """End a process at once."""

    def resume(self, process: psutil.Process) -> None:
        """Let a process go on that was sent SIGSTOP."""

    def restore_is_due(self) -> bool:
        """Whether applications of a lost head wait to be restored."""

    def bring_back(self) -> None:
        """Start a new head. Raises where it does not start."""

    def restore(self) -> None:
        """Restore the applications. Raises where one does not start."""


def must_restart(state: State, *, bad_for_s: float, age_s: float) -> bool:
    """Whether a part is given up: dead, or without an answer for too long although it was not just started."""
    return state is State.dead or (state is State.silent and bad_for_s >= SILENT_S and age_s >= YOUNG_S)


class Supervisor:
    """Watches the parts of one cluster.

    Args:
        machine: what is watched.
        note: records that a part was started again: its name, why, and how often it was tried.
        metrics: counts.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        note: Callable[[str, str, int], None],
        metrics: SupervisorMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._note = note
        self._metrics = metrics
        self._clock = clock
        self._known: dict[Part, psutil.Process] = {}
        self._bad_since: dict[Part, float] = {}
        self._backoffs = {name: Backoff() for name in MINDED} | {HEAD: Backoff(REBUILD_LONGEST_S)}
        self._silent: set[Part] = set()
        self._probed_at = -PROBE_EVERY_S
        self.rebuilding: threading.Thread | None = None
        """The thread that brings back a head, or its applications."""

    def try_at_once(self) -> None:
        """Forget how often something has failed: somebody has just mended the cause, say."""
        for backoff in self._backoffs.values():
            backoff.forget()

    def turn(self) -> None:
        """Look once at every part, and do what is needed."""
        states = self._look()
        for part, state in states.items():
            self._metrics.up.labels(part.value).set(state is State.running)
            if state is State.stopped:
                self._resume(part)
            elif state is State.running:
                self._bad_since.pop(part, None)
        for part in MINDED:
            if part not in RAYS_OWN:
                self._mind(part, states[part])
        if self.rebuilding is None or not self.rebuilding.is_alive():
            self._mind_head(states)

    def _mind_head(self, states: dict[Part, State]) -> None:
        """Ray's own parts: a lost raylet, or a GCS that does not stay, means a new head."""
        gcs_lost = states[Part.gcs] is State.dead and self._backoffs[Part.gcs].attempts >= GCS_TRIES
        head_runs = states[Part.raylet] is not State.dead and not gcs_lost
        now, backoff = self._clock(), self._backoffs[HEAD]
        if head_runs:
            for part in RAYS_OWN:
                if part is not Part.raylet:
                    self._mind(part, states[part])
            if not self._machine.restore_is_due():
                backoff.runs(now)
                return
        if backoff.may_try(now):
            backoff.tried(now)
            self.rebuilding = threading.Thread(
                target=self._rebuild, args=(head_runs,), name="head", daemon=True
            )
            self.rebuilding.start()

    def _rebuild(self, head_runs: bool) -> None:
        """A new head where there is none, and then its applications; what fails is tried again later."""
        started = self._clock()
        try:
            if not head_runs:
                LOG.error("the Ray head is lost; a new one is started")
                self._machine.bring_back()
                self._backoffs[Part.gcs].forget()
                self._restarted(HEAD, State.dead)
            self._machine.restore()
            self._metrics.recovery.observe(self._clock() - started)
            LOG.warning("the applications are back after %.0f s", self._clock() - started)
        except Exception as error:  # noqa: BLE001 (it is tried again, whatever it was)
            self._metrics.failures.labels(HEAD).inc()
            LOG.error("the head or its applications did not come back: %s", error)

    def _mind(self, part: Part, state: State) -> None:
        """Start a part again that does not run, if it is time."""
        now, backoff = self._clock(), self._backoffs[part]
        if state is State.running:
            backoff.runs(now)
        if not self._given_up(part, state) or not backoff.may_try(now):
            return
        backoff.tried(now)
        try:
            if state is not State.dead and (process := self._known.get(part)) is not None:
                self._machine.kill(process)
            if not self._machine.start(part):
                return
        except Exception as error:  # noqa: BLE001 (it is tried again, whatever it was)
            self._metrics.failures.labels(part.value).inc()
            LOG.error("%s could not be started: %s", part.value, error)
            return
        self._known.pop(part, None)
        self._bad_since.pop(part, None)
        self._restarted(part, state)

    def _restarted(self, part: Part | str, reason: State) -> None:
        name = part.value if isinstance(part, Part) else part
        attempts = self._backoffs[part].attempts
        LOG.warning("%s was started again (%s, attempt %d)", name, reason, attempts)
        self._metrics.restarts.labels(name, reason.value).inc()
        # The 1st, 2nd, 4th, 8th …: a part that never stays fills no ledger.
        if attempts & (attempts - 1) == 0:
            self._note(name, reason.value, attempts)

    def _resume(self, part: Part) -> None:
        """Let a part go on that has been stopped for a while: unlike a new one, it loses nothing."""
        now = self._clock()
        if now - self._bad_since.setdefault(part, now) >= STOPPED_S and (process := self._known.get(part)):
            self._bad_since.pop(part)
            self._machine.resume(process)
            LOG.warning("%s had been stopped, and was told to go on", part.value)
            self._metrics.restarts.labels(part.value, State.stopped.value).inc()
            self._note(part.value, State.stopped.value, 1)

    def _given_up(self, part: Part, state: State) -> bool:
        """Whether a part is to be started again, by how long it has not been well."""
        now = self._clock()
        since = now if state is State.running else self._bad_since.setdefault(part, now)
        return must_restart(state, bad_for_s=now - since, age_s=self._age(part))

    def _age(self, part: Part) -> float:
        process = self._known.get(part)
        return time.time() - process.create_time() if process is not None else 0.0

    def _look(self) -> dict[Part, State]:
        states = {part: state_of(self._known.get(part)) for part in (*MINDED, Part.raylet)}
        if State.dead in states.values():
            self._known = self._machine.find()
            states = {part: state_of(self._known.get(part)) for part in states}
        now = self._clock()
        if now >= self._probed_at + PROBE_EVERY_S:
            self._probed_at = now
            running = [part for part, state in states.items() if state is State.running]
            self._silent = {part for part in running if not self._machine.answers(part)}
        return {
            part: State.silent if state is State.running and part in self._silent else state
            for part, state in states.items()
        }
