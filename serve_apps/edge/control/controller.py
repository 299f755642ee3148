"""The edge's controller: follows the ledger and Serve, and keeps HAProxy true to both.

It only ever moves forward: while the ledger or Serve cannot be read, or a file not written, or HAProxy refuses a
configuration, the last good state stays and the step is tried again; one that starts then begins with what its
predecessor has left on disk. When it is killed, or hands over, HAProxy serves on. A changed split is one `set map`, and
then the map file on disk, before it counts as applied, so that neither a crash nor a reload can undo it; it waits for
nothing, neither for Serve nor for a reload nor for the disk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from cluster.errors import FalajError
from cluster.ledger import Ledger
from cluster.storage import write_bytes
from serve_apps.edge.control.certificate import Certificate
from serve_apps.edge.control.haproxy_process import ConfigRefused, HAProxy
from serve_apps.edge.control.last_state import Last
from serve_apps.edge.control.metrics import EdgeMetrics
from serve_apps.edge.control.polled_source import Followed
from serve_apps.edge.control.running_map import RunningMap
from serve_apps.edge.control.state import EdgeState, write_state
from serve_apps.edge.haproxy import unauthenticated as strangers
from serve_apps.edge.haproxy.answers import ERROR_STATUSES, error_file
from serve_apps.edge.haproxy.config import EdgeSettings, render
from serve_apps.edge.haproxy.keys import JwtKey
from serve_apps.edge.haproxy.limiting import Limited, OwnLimits
from serve_apps.edge.haproxy.routes import Backend, Routes, routes
from serve_apps.replica.access import in_background
from serve_apps.replica.targets import Targets
from serve_apps.rollout.state import States, apply

LEDGER_INTERVAL_S = 0.03
SERVE_INTERVAL_S = 0.5
KEYS_INTERVAL_S = 1.0
FIRST_ANSWER_S = 5.0
ERROR_INTERVAL_S = 0.5
KEEP_EVERY_S = 60.0
REFUSED_AGAIN_S = 10.0
"""A configuration that HAProxy refused is tried again after this: a file that it names may have come back."""
ACTOR = "system:edge"
LOG = logging.getLogger("falaj.edge")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """All that a configuration is made from."""

    backends: tuple[Backend, ...]
    champions: tuple[str, ...]
    keys: tuple[JwtKey, ...]
    certificate: str
    """Its file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A configuration that HAProxy does not take."""

    loaded: Loaded
    why: str
    again_at: float
    """When it is tried again."""


class Controller:
    """Brings HAProxy in line, step by step."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        fetch_targets: Callable[[], Targets],
        fetch_keys: Callable[[], tuple[JwtKey, ...]],
        haproxy: HAProxy,
        settings: EdgeSettings,
        state_file: Path,
        metrics: EdgeMetrics | None = None,
    ) -> None:
        self._ledger = ledger
        self._haproxy = haproxy
        self._settings = settings
        self._state_file = state_file
        self._metrics = metrics or EdgeMetrics(CollectorRegistry())
        self._states: States = {}
        self._seq = 0
        self._ledger_read = False
        self._last_file = state_file.with_name("last.json")
        self._last = Last.read(self._last_file, now=time.time())
        self._targets = Followed(
            fetch_targets, name="Serve", value=Targets(self._last.targets), interval_s=SERVE_INTERVAL_S
        )
        self._keys = Followed(
            fetch_keys, name="the issuer", value=self._last.keys, interval_s=KEYS_INTERVAL_S
        )
        self._certificate = Certificate(Path(settings.certificate), state_file.with_name("certificates"))
        self._own_limits = OwnLimits()
        self._append = in_background(ledger)
        self._strangers = strangers.Seen(at=time.time())
        self._splits = RunningMap(haproxy, Path(settings.map_file))
        self._limits = {kind: RunningMap(haproxy, settings.limits.file(kind)) for kind in Limited}
        self._maps = (self._splits, *self._limits.values())
        self._loader = ThreadPoolExecutor(1, "loading")
        self._loading: tuple[Loaded, Future[None]] | None = None
        self._loaded: Loaded | None = None
        self._refused: Refused | None = None
        self._written: EdgeState | None = None

    def run(self, stopped: threading.Event, *, handed_over: threading.Event | None = None) -> None:
        """Step until told to stop, and then end HAProxy, unless another controller takes it over.

        What nobody had thought of ends this and leaves HAProxy to serve.
        """
        ordered = False
        for status in ERROR_STATUSES:
            write_bytes(f"{self._settings.error_folder}/{status}.http", error_file(status).encode())
        try:
            while not stopped.is_set():
                stopped.wait(LEDGER_INTERVAL_S if self._step_or_stay() else ERROR_INTERVAL_S)
            ordered = handed_over is None or not handed_over.is_set()
            self._tell_of_strangers()
        finally:
            self._targets.stop()
            self._keys.stop()
            self._loader.shutdown()
            if ordered:
                self._haproxy.stop()

    def _step_or_stay(self) -> bool:
        """A step; when it fails after a good one, a full disk say, what runs stays and the step is tried again."""
        self._metrics.last_step.set_to_current_time()
        try:
            with self._metrics.step_seconds.time():
                self.step()
        except (OSError, FalajError) as error:
            self._metrics.failed_steps.inc()
            if self._loaded is None and self._haproxy.pid is None:
                raise
            LOG.error("the edge stays as it is, because a change cannot be applied: %s", error)
            return False
        return True

    def step(self) -> None:
        """Look once, and apply what is new: the split first, then replicas and keys.

        Raises:
            OSError, FalajError: something could not be applied; the next step tries it again.
        """
        self._follow_ledger()
        if not self._ledger_read and self._haproxy.serve_last():
            return
        for source in (self._targets, self._keys):
            source.look(wait_s=FIRST_ANSWER_S if self._is_first else 0.0)
        wanted = routes(self._states, self._targets.value)
        self._bring_maps(wanted)
        if self._loaded is not None:
            self._write_state()
        self._bring_backends(wanted)
        if self._loading is None and self._haproxy.revive():
            self._metrics.revivals.inc()
            LOG.warning("HAProxy had died and was started again")
        self._write_state()
        self._keep_last()
        if self._loading is None and time.time() > self._strangers.at + strangers.EVERY_S:
            self._tell_of_strangers()

    def _follow_ledger(self) -> None:
        try:
            if self._ledger.head() == self._seq:
                self._ledger_read = True
                return
            for entry in self._ledger.entries(after=self._seq):
                event = entry.event()
                self._states = apply(self._states, event, time=entry.time)
                self._own_limits = self._own_limits.apply(event)
                self._seq = entry.seq
            self._ledger_read = True
        except sa.exc.SQLAlchemyError as error:
            LOG.warning("the ledger cannot be read, the last state stays: %s", error)

    def _bring_maps(self, wanted: Routes) -> None:
        self._splits.bring(wanted.entries)
        for kind, running in self._limits.items():
            running.bring(self._own_limits.entries(kind, self._settings.limits.of(kind)))

    def _bring_backends(self, wanted: Routes) -> None:
        """Load what is new, in a thread, because a split that changes must not wait for it."""
        self._finish_loading()
        loaded = Loaded(
            backends=wanted.backends,
            champions=wanted.champions,
            keys=self._believed_keys(),
            certificate=str(self._certificate.newest()),
        )
        if loaded == self._loaded:
            self._refused = None
            return
        if self._loading is not None or self._is_refused(loaded):
            return
        LOG.info("loading %s with keys %s", wanted, [key.kid for key in loaded.keys])
        for running in self._maps:
            running.note_changes()
        self._look_at_strangers()
        text = render(wanted, loaded.keys, replace(self._settings, certificate=loaded.certificate))
        self._loading = loaded, self._loader.submit(self._haproxy.load, text)
        if self._loaded is None:
            wait([self._loading[1]])
            self._finish_loading()

    def _believed_keys(self) -> tuple[JwtKey, ...]:
        """The issuer's, or those of the controller before while the issuer has not answered to this one."""
        if self._keys.answered_at:
            return self._keys.value
        return self._last.believed(now=time.time()).keys

    def _finish_loading(self) -> None:
        if self._loading is None or not self._loading[1].done():
            return
        loaded, loading = self._loading
        self._loading = None
        self._metrics.loads.labels("refused" if loading.exception() else "ok").inc()
        try:
            loading.result()
        except ConfigRefused as error:
            self._refuse(loaded, error)
            return
        self._refused = None
        for running in self._maps:
            running.tell_again()
        self._strangers = self._strangers.begin_again()
        self._certificate.forget_others(Path(loaded.certificate))
        self._loaded = loaded

    @property
    def _is_first(self) -> bool:
        """Whether no configuration was loaded or refused yet."""
        return self._loaded is None and self._refused is None

    def _is_refused(self, loaded: Loaded) -> bool:
        refused = self._refused
        return refused is not None and refused.loaded == loaded and time.monotonic() < refused.again_at

    def _refuse(self, loaded: Loaded, error: ConfigRefused) -> None:
        """Stay with the last configuration that HAProxy took, an earlier controller's included.

        Raises:
            ConfigRefused: there is none.
        """
        if self._refused is None or self._refused.loaded != loaded:
            LOG.error("the edge stays as it is: %s", error)
        if not self._haproxy.serve_last():
            raise error
        again_at = time.monotonic() + REFUSED_AGAIN_S
        self._refused = Refused(loaded=loaded, why=str(error), again_at=again_at)

    def _keep_last(self) -> None:
        """For the next controller; once a minute also that the issuer still says the same."""
        last = Last(
            targets=self._targets.value,
            keys=self._believed_keys(),
            at=self._keys.answered_at or self._last.at,
        )
        if replace(last, at=self._last.at) != self._last or last.at > self._last.at + KEEP_EVERY_S:
            last.write(self._last_file)
            self._last = last

    def _tell_of_strangers(self) -> None:
        self._look_at_strangers()
        self._strangers, events = self._strangers.tell(at=time.time())
        for event in events:
            self._append(event, actor=ACTOR)

    def _look_at_strangers(self) -> None:
        """Their counts end with the worker; one that does not answer holds up nothing."""
        if self._loaded is None:
            return
        try:
            self._strangers = self._strangers.look(strangers.counts(self._haproxy.ask(strangers.SHOWN)))
        except OSError as error:
            LOG.warning("the worker does not say how many strangers it has refused: %s", error)

    def _write_state(self) -> None:
        self._metrics.applied_seq.set(self._seq)
        state = EdgeState(
            applied_seq=self._seq,
            backends=[backend.name for backend in self._loaded.backends] if self._loaded else [],
            pid=self._haproxy.pid,
            refused=self._refused.why if self._refused else "",
        )
        if state != self._written:
            write_state(self._state_file, state)
            self._written = state
