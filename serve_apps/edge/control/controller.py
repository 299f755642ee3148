"""The edge's controller: reads the ledger and Serve, and applies their changes to HAProxy.

The controller never goes back to an older state. Its step fails if the ledger or Serve cannot be read, a file cannot be
written, or HAProxy refuses a configuration. Then the last valid state stays, and the step is tried again. If a
controller starts at such a time, it uses the state that an earlier controller stored on disk. When a controller is
killed or hands over, HAProxy continues to serve.

A changed split is applied in two steps: one `set map`, then the map file on disk. Only after both steps the change
counts as applied, so neither a crash nor a reload can undo it. It does not wait for Serve, for a reload or an fsync.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import CollectorRegistry

from cluster.errors import FalajError
from cluster.ledger import Ledger
from cluster.storage import write_bytes
from serve_apps.edge.control.certificate import Certificate
from serve_apps.edge.control.edge_state import EdgeState, read_state, write_state
from serve_apps.edge.control.followed_ledger import FollowedLedger
from serve_apps.edge.control.haproxy_process import ConfigRefused, HAProxy
from serve_apps.edge.control.journaled import FollowedJournal
from serve_apps.edge.control.last_answers import LastState
from serve_apps.edge.control.live_edges import EdgeReporter, edge_id
from serve_apps.edge.control.metrics import EdgeMetrics
from serve_apps.edge.control.polled_source import PolledSource
from serve_apps.edge.control.running_map import RunningMap
from serve_apps.edge.haproxy import unauthenticated
from serve_apps.edge.haproxy.answers import ERROR_STATUSES, error_file
from serve_apps.edge.haproxy.config import EdgeSettings, render
from serve_apps.edge.haproxy.keys import JwtKey
from serve_apps.edge.haproxy.request_limits import Limited
from serve_apps.edge.haproxy.routes import Backend, Routes, routes
from serve_apps.replica.access import append_in_background
from serve_apps.replica.targets import Targets
from serve_apps.rollout.outage.journal import Journal

STEP_INTERVAL_S = 0.03
"""Longest pause between two steps, for what is not announced: a reload that is done, an HAProxy that died."""
SERVE_INTERVAL_S = 0.5
KEYS_INTERVAL_S = 1.0
FIRST_ANSWER_S = 5.0
"""How many seconds the first configuration waits for the ledger, for Serve, and for the issuer."""
ERROR_INTERVAL_S = 0.5
STORE_INTERVAL_S = 60.0
"""Seconds after which the time of the issuer's last answer is stored again."""
RETRY_REFUSED_S = 10.0
"""Seconds after which a refused configuration is tried again. A file that was missing may exist by then."""
ACTOR = "system:edge"
LOG = logging.getLogger("falaj.edge")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Values that HAProxy's configuration is built from."""

    backends: tuple[Backend, ...]
    champions: tuple[str, ...]
    keys: tuple[JwtKey, ...]
    certificate: str
    """File name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """A configuration that HAProxy is loading."""

    inputs: Inputs
    done: Future[None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A configuration that HAProxy refused."""

    inputs: Inputs
    reason: str
    retry_at: float
    """Monotonic time of the next try."""


class Controller:
    """Applies changes of the ledger and of Serve to HAProxy, step by step.

    Args:
        ledger: the events to follow; on PostgreSQL, its database has the reports of all edges.
        fetch_targets, fetch_keys: fetch the replicas from Serve, and the issuer's keys.
        haproxy, settings: HAProxy, and the settings of its configuration.
        state_file: file for the edge's state; other files of the edge are beside it.
        journal: rollbacks that this machine decided while the ledger did not answer.
        address: the edge's URL and host name, for messages of commands.
        metrics: the controller's metrics.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        fetch_targets: Callable[[], Targets],
        fetch_keys: Callable[[], tuple[JwtKey, ...]],
        haproxy: HAProxy,
        settings: EdgeSettings,
        state_file: Path,
        journal: Journal,
        address: str = "",
        metrics: EdgeMetrics | None = None,
    ) -> None:
        self._haproxy = haproxy
        self._settings = settings
        self._state_file = state_file
        self._reporter = EdgeReporter(
            ledger,
            edge=edge_id(state_file.parent),
            address=address,
            count_file=state_file.with_name("edge.count"),
        )
        self._metrics = metrics or EdgeMetrics(CollectorRegistry())
        self._followed = FollowedLedger(ledger)
        self._ledger_state = self._followed.value
        self._journal = FollowedJournal(journal)
        self._last_file = state_file.with_name("last.json")
        self._last = LastState.read(self._last_file, now=time.time())
        self._targets = PolledSource(
            fetch_targets, name="Serve", value=Targets(self._last.targets), interval_s=SERVE_INTERVAL_S
        )
        self._keys = PolledSource(
            fetch_keys, name="the issuer", value=self._last.keys, interval_s=KEYS_INTERVAL_S
        )
        self._certificate = Certificate(Path(settings.certificate), state_file.with_name("certificates"))
        self._append = append_in_background(ledger)
        self._refusals = unauthenticated.RefusalCounts(reported_at=time.time())
        self._splits = RunningMap(haproxy, Path(settings.map_file))
        self._limits = {kind: RunningMap(haproxy, settings.limits.file(kind)) for kind in Limited}
        self._maps = (self._splits, *self._limits.values())
        self._loader = ThreadPoolExecutor(1, "loading")
        self._loading: Loading | None = None
        self._loaded: Inputs | None = None
        self._refused: Refused | None = None
        self._written: EdgeState | None = None

    def run(self, stopped: threading.Event, *, handed_over: threading.Event | None = None) -> None:
        """Run steps until `stopped` is set. Then stop HAProxy, unless another controller takes over.

        An unexpected error ends the loop, but HAProxy continues to run.
        """
        stop_haproxy = False
        for status in ERROR_STATUSES:
            write_bytes(f"{self._settings.error_folder}/{status}.http", error_file(status).encode())
        try:
            while not stopped.is_set():
                if self._try_step():
                    self._followed.wait_for_change(STEP_INTERVAL_S)
                else:
                    stopped.wait(ERROR_INTERVAL_S)
            stop_haproxy = handed_over is None or not handed_over.is_set()
            self._report_refusals()
        finally:
            self._followed.stop()
            self._targets.stop()
            self._keys.stop()
            self._loader.shutdown()
            if stop_haproxy:
                self._haproxy.stop()
            self._reporter.stop(remove=stop_haproxy)  # until here, commands wait for this edge

    def _try_step(self) -> bool:
        """Run a step. If it fails while HAProxy runs, for example on a full disk, log the error and return False."""
        self._metrics.last_step.set_to_current_time()
        try:
            with self._metrics.step_seconds.time():
                self.step()
        except (OSError, FalajError) as error:
            self._metrics.failed_steps.inc()
            if self._loaded is None and self._haproxy.pid is None:
                raise
            LOG.error("a change cannot be applied, so the edge stays as it is: %s", error)
            return False
        self._metrics.last_success.set_to_current_time()
        return True

    def step(self) -> None:
        """Read the ledger, Serve and the issuer once, and apply changes: first the split, then replicas and keys.

        Raises:
            OSError, FalajError: a change could not be applied. The next step tries again.
        """
        self._take_ledger_state()
        if not self._followed.is_read and self._haproxy.serve_last():
            self._journal.apply_to_map(Path(self._settings.map_file), self._haproxy)
            return
        for source in (self._targets, self._keys):
            source.poll(wait_s=FIRST_ANSWER_S if self._is_first else 0.0)
        states = self._journal.without_rolled_back(self._ledger_state.states)
        wanted = routes(states, self._targets.value)
        if self._is_first:
            self._report_first()
        self._update_maps(wanted)
        if self._loaded is not None:
            self._write_state()
        self._update_config(wanted)
        if self._loading is None and self._haproxy.restart_if_dead():
            self._metrics.revivals.inc()
            LOG.warning("HAProxy had died and was started again")
        self._write_state()
        self._store_last()
        report_at = self._refusals.reported_at + unauthenticated.REPORT_INTERVAL_S
        if self._loading is None and time.time() > report_at:
            self._report_refusals()

    def _take_ledger_state(self) -> None:
        """Take what the ledger's thread has read.

        Raises:
            FalajError: this release is too old for the newest events.
            RuntimeError: the ledger's thread has ended. The supervisor must start the controller again.
        """
        self._followed.start()
        if self._followed.has_ended:
            raise RuntimeError("The thread that reads the ledger has ended.") from self._followed.error
        if not self._followed.is_read:
            self._followed.wait_for_first(FIRST_ANSWER_S if self._is_first else 0.0)
        if self._followed.error is not None:
            raise self._followed.error
        self._ledger_state = self._followed.value

    def _report_first(self) -> None:
        """Report what the earlier controller has applied, so that the first limits are this edge's share."""
        self._reporter.report(read_state(self._state_file))
        self._reporter.wait_for_first(FIRST_ANSWER_S)

    def _update_maps(self, wanted: Routes) -> None:
        self._splits.update(wanted.entries)
        for kind, running_map in self._limits.items():
            default = self._settings.limits.of(kind)
            own_limits = self._ledger_state.own_limits
            running_map.update(own_limits.entries(kind, default, num_edges=self._reporter.num_edges))

    def _update_config(self, wanted: Routes) -> None:
        """Load a changed configuration in a thread, because a changed split must not wait for the reload."""
        self._finish_loading()
        inputs = Inputs(
            backends=wanted.backends,
            champions=wanted.champions,
            keys=self._valid_keys(),
            certificate=str(self._certificate.newest()),
        )
        if inputs == self._loaded and not (self._loading is None and self._haproxy.is_rotation_due):
            self._refused = None
            return
        if self._loading is not None or self._is_refused(inputs):
            return
        LOG.info("loading %s with keys %s", wanted, [key.kid for key in inputs.keys])
        for running_map in self._maps:
            running_map.track_changes()
        self._read_refusals()
        text = render(wanted, inputs.keys, replace(self._settings, certificate=inputs.certificate))
        self._loading = Loading(inputs=inputs, done=self._loader.submit(self._haproxy.load, text))
        if self._loaded is None:
            wait([self._loading.done])
            self._finish_loading()

    def _valid_keys(self) -> tuple[JwtKey, ...]:
        """Return the issuer's keys. Until the issuer has answered this controller, return the stored keys."""
        if self._keys.answered_at:
            return self._keys.value
        return self._last.without_old_keys(now=time.time()).keys

    def _finish_loading(self) -> None:
        if self._loading is None or not self._loading.done.done():
            return
        inputs, done = self._loading.inputs, self._loading.done
        self._loading = None
        self._metrics.loads.labels("refused" if done.exception() else "ok").inc()
        try:
            done.result()
        except ConfigRefused as error:
            self._handle_refused(inputs, error)
            return
        self._refused = None
        for running_map in self._maps:
            running_map.resend_changes()
        self._refusals = self._refusals.reset_worker()
        self._certificate.remove_others(Path(inputs.certificate))
        self._loaded = inputs

    @property
    def _is_first(self) -> bool:
        """True until HAProxy has loaded or refused the first configuration of this controller."""
        return self._loaded is None and self._refused is None

    def _is_refused(self, inputs: Inputs) -> bool:
        refused = self._refused
        return refused is not None and refused.inputs == inputs and time.monotonic() < refused.retry_at

    def _handle_refused(self, inputs: Inputs, error: ConfigRefused) -> None:
        """Continue with the last accepted configuration. It may come from an earlier controller.

        Raises:
            ConfigRefused: no configuration was accepted yet.
        """
        if self._refused is None or self._refused.inputs != inputs:
            LOG.error("the edge stays as it is: %s", error)
        if not self._haproxy.serve_last():
            raise error
        retry_at = time.monotonic() + RETRY_REFUSED_S
        self._refused = Refused(inputs=inputs, reason=str(error), retry_at=retry_at)

    def _store_last(self) -> None:
        """Store changed targets and keys for the next controller, and once a minute the time of the issuer's answer."""
        last = LastState(
            targets=self._targets.value,
            keys=self._valid_keys(),
            at=self._keys.answered_at or self._last.at,
        )
        if replace(last, at=self._last.at) != self._last or last.at > self._last.at + STORE_INTERVAL_S:
            last.write(self._last_file)
            self._last = last

    def _report_refusals(self) -> None:
        """Append the numbers of refused unauthenticated requests to the ledger."""
        self._read_refusals()
        self._refusals, events = self._refusals.report(at=time.time())
        for event in events:
            self._append(event, actor=ACTOR)

    def _read_refusals(self) -> None:
        """Read the counts of refused requests from HAProxy's worker. If the worker does not answer, change nothing."""
        if self._loaded is None:
            return
        try:
            table_text = self._haproxy.query(unauthenticated.SHOW_COMMAND)
        except OSError as error:
            LOG.warning("the worker does not answer how many requests it refused: %s", error)
            return
        self._refusals = self._refusals.update(unauthenticated.parse_counts(table_text))

    def _write_state(self) -> None:
        self._metrics.applied_seq.set(self._ledger_state.seq)
        state = EdgeState(
            applied_seq=self._ledger_state.seq,
            backends=[backend.name for backend in self._loaded.backends] if self._loaded else [],
            pid=self._haproxy.pid,
            refused=self._refused.reason if self._refused else "",
        )
        if state != self._written:
            self._reporter.report(state)
            write_state(self._state_file, state)
            self._written = state
