"""The supervisor's loop: check every part once a second, and restart parts that do not run.

No failure ends the loop: a failed restart is tried again, with growing waits. The supervisor finds the parts among all
processes of the machine, so it need not be their parent. If the supervisor is killed and restarted, the parts keep
running.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import psutil

from cluster.node.parts import RAY_PARTS, Part, State, state_of
from cluster.supervisor.backoff import Backoff
from cluster.supervisor.metrics import SupervisorMetrics

STOPPED_S = 10.0
"""A part that was stopped with SIGSTOP gets SIGCONT after this time, in seconds."""
SILENT_S = 15.0
"""A part that does not answer is restarted after this time, in seconds."""
YOUNG_S = 60.0
"""A part of a lower age, in seconds, may still be starting and need not answer."""
REBUILD_LONGEST_S = 300.0
"""Longest wait in seconds between two tries to restore applications. Each try starts a process and adds an event."""
GCS_TRIES = 3
"""Restarts of the GCS that may fail before the whole head is replaced."""
PROBE_EVERY_S = 5.0
HEAD = "Ray head"
"""Name of all of Ray on this machine, in events and metrics."""
LOG = logging.getLogger("falaj.supervisor")


class Machine(Protocol):
    """The supervisor's operations on the machine."""

    def find(self) -> dict[Part, psutil.Process]:
        """Find the running parts among all processes of the machine."""

    def answers(self, part: Part) -> bool:
        """Return whether a running part answers."""

    def start(self, part: Part) -> bool:
        """Start a part, or return False if the supervisor cannot start it. Raise an error if the start fails."""

    def kill(self, process: psutil.Process) -> None:
        """Kill a process."""

    def resume(self, process: psutil.Process) -> None:
        """Send SIGCONT to a stopped process."""

    def restore_is_due(self) -> bool:
        """Return whether Ray or its applications wait to be restored."""

    def replace_head(self) -> None:
        """Start Ray anew. Raise an error if it does not start."""

    def restore(self) -> None:
        """Restore the applications. Raise an error if one of them does not start."""


def must_restart(state: State, *, unhealthy_s: float, age_s: float) -> bool:
    """Return whether a part must be restarted: it is dead, or it is silent for too long and old enough to answer."""
    return state is State.dead or (state is State.silent and unhealthy_s >= SILENT_S and age_s >= YOUNG_S)


class Supervisor:
    """Watches the parts of one cluster.

    Args:
        machine: The machine that the cluster runs on.
        record_restart: Records a restart, with the part's name, the reason and the number of attempts.
        metrics: Metrics to update.
        parts: Parts that this machine needs.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        record_restart: Callable[[str, str, int], None],
        metrics: SupervisorMetrics,
        parts: Iterable[Part] = tuple(Part),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._record_restart = record_restart
        self._metrics = metrics
        self._clock = clock
        self._processes: dict[Part, psutil.Process] = {}
        self._unhealthy_since: dict[Part, float] = {}
        self._parts = [part for part in parts if part is not Part.supervisor]
        self._backoffs = {name: Backoff() for name in self._parts} | {HEAD: Backoff(REBUILD_LONGEST_S)}
        self._silent: set[Part] = set()
        self._probed_at = -PROBE_EVERY_S
        self.states: dict[Part, State] = {}
        """State of each part at the last check."""
        self.rebuilding: threading.Thread | None = None
        """Thread that replaces the head or restores its applications."""

    def retry_now(self) -> None:
        """Reset all backoffs, for example after an operator fixed the cause of a failure."""
        for backoff in self._backoffs.values():
            backoff.reset()

    def check_once(self) -> None:
        """Check every part once, and restart or resume parts where needed."""
        self.states = states = self._states()
        for part, state in states.items():
            self._metrics.up.labels(part.value).set(state is State.running)
            if state is State.stopped:
                self._resume(part)
            elif state is State.running:
                self._unhealthy_since.pop(part, None)
        for part in self._parts:
            if part not in RAY_PARTS:
                self._restart_if_needed(part, states[part])
        if self.rebuilding is None or not self.rebuilding.is_alive():
            self._check_head(states)
        self._metrics.last_success.set_to_current_time()

    def _check_head(self, states: dict[Part, State]) -> None:
        """Check Ray's parts. A dead raylet, or a GCS that dies again and again, needs a new head."""
        gcs_lost = states.get(Part.gcs) is State.dead and self._backoffs[Part.gcs].attempts >= GCS_TRIES
        head_runs = states[Part.raylet] is not State.dead and not gcs_lost
        now, backoff = self._clock(), self._backoffs[HEAD]
        if head_runs:
            for part in RAY_PARTS:
                if part is not Part.raylet and part in states:
                    self._restart_if_needed(part, states[part])
            if not self._machine.restore_is_due():
                backoff.record_running(now)
                return
        if backoff.may_try(now):
            backoff.record_try(now)
            self.rebuilding = threading.Thread(
                target=self._rebuild, args=(head_runs,), name="head", daemon=True
            )
            self.rebuilding.start()

    def _rebuild(self, head_runs: bool) -> None:
        """Start a new head if no head runs, then restore the applications. After a failure, both are tried again."""
        started = self._clock()
        try:
            if not head_runs:
                LOG.error("Ray is lost; starting it anew")
                self._machine.replace_head()
                if Part.gcs in self._backoffs:
                    self._backoffs[Part.gcs].reset()
                self._report_restart(HEAD, State.dead)
            self._machine.restore()
            self._metrics.recovery.observe(self._clock() - started)
            LOG.warning("Ray was restored after %.0f s", self._clock() - started)
        except Exception as error:  # noqa: BLE001 (any failure is tried again)
            self._metrics.failures.labels(HEAD).inc()
            LOG.error("Ray or its applications could not be restored: %s", error)

    def _restart_if_needed(self, part: Part, state: State) -> None:
        """Restart a part if it does not run and its backoff allows a try."""
        now, backoff = self._clock(), self._backoffs[part]
        if state is State.running:
            backoff.record_running(now)
        if not self._must_restart(part, state) or not backoff.may_try(now):
            return
        backoff.record_try(now)
        try:
            if state is not State.dead and (process := self._processes.get(part)) is not None:
                self._machine.kill(process)
            if not self._machine.start(part):
                return
        except Exception as error:  # noqa: BLE001 (any failure is tried again)
            self._metrics.failures.labels(part.value).inc()
            LOG.error("%s could not be started: %s", part.value, error)
            return
        self._processes.pop(part, None)
        self._unhealthy_since.pop(part, None)
        self._report_restart(part, state)

    def _report_restart(self, part: Part | str, reason: State) -> None:
        """Log and count a restart; record the 1st, 2nd, 4th, 8th … attempt in the ledger.

        So a part that dies again and again does not fill the ledger.
        """
        name = part.value if isinstance(part, Part) else part
        attempts = self._backoffs[part].attempts
        LOG.warning("%s was restarted (%s, attempt %d)", name, reason, attempts)
        self._metrics.restarts.labels(name, reason.value).inc()
        if attempts & (attempts - 1) == 0:
            self._record_restart(name, reason.value, attempts)

    def _resume(self, part: Part) -> None:
        """Resume a part that has been stopped for `STOPPED_S`. Unlike a restart, this loses nothing."""
        now = self._clock()
        if now - self._unhealthy_since.setdefault(part, now) < STOPPED_S:
            return
        if process := self._processes.get(part):
            self._unhealthy_since.pop(part)
            self._machine.resume(process)
            LOG.warning("%s was stopped, and has been resumed", part.value)
            self._metrics.restarts.labels(part.value, State.stopped.value).inc()
            self._record_restart(part.value, State.stopped.value, 1)

    def _must_restart(self, part: Part, state: State) -> bool:
        now = self._clock()
        since = now if state is State.running else self._unhealthy_since.setdefault(part, now)
        return must_restart(state, unhealthy_s=now - since, age_s=self._age_s(part))

    def _age_s(self, part: Part) -> float:
        process = self._processes.get(part)
        return time.time() - process.create_time() if process is not None else 0.0

    def _states(self) -> dict[Part, State]:
        """Return the state of every part. Search all processes only if a known process is dead."""
        states = {part: state_of(self._processes.get(part)) for part in self._parts}
        if State.dead in states.values():
            self._processes = self._machine.find()
            states = {part: state_of(self._processes.get(part)) for part in states}
        now = self._clock()
        if now >= self._probed_at + PROBE_EVERY_S:
            self._probed_at = now
            running = [part for part, state in states.items() if state is State.running]
            self._silent = {part for part in running if not self._machine.answers(part)}
        return {
            part: State.silent if state is State.running and part in self._silent else state
            for part, state in states.items()
        }
