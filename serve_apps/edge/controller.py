"""The edge's controller: follows the ledger and Serve, and keeps HAProxy true to both.

It only ever moves forward: while the ledger or Serve cannot be read, or a file not written, or HAProxy refuses a
configuration, the last good state stays and the step is tried again. A changed split is the map file on disk first,
then one `set map`, so that neither a crash nor a reload can undo it; it waits for nothing else, least of all for Serve.
"""

from __future__ import annotations

import json
import logging
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cluster.errors import FalajError
from cluster.ledger import Ledger
from cluster.session import ClusterRecord
from cluster.storage import write_bytes
from serve_apps.edge.answers import ERROR_STATUSES, error_file
from serve_apps.edge.config import EdgeSettings, render
from serve_apps.edge.followed import Followed
from serve_apps.edge.haproxy import HAProxy
from serve_apps.edge.keys import JwtKey
from serve_apps.edge.limiting import Limited, OwnLimits
from serve_apps.edge.routes import Backend, Routes, routes
from serve_apps.edge.running_map import RunningMap
from serve_apps.edge.state import EdgeState, write_state
from serve_apps.rollout.state import States, apply

LEDGER_INTERVAL_S = 0.03
SERVE_INTERVAL_S = 0.5
KEYS_INTERVAL_S = 1.0
FIRST_ANSWER_S = 5.0
ERROR_INTERVAL_S = 0.5
LOG = logging.getLogger("falaj.edge")

Targets = dict[str, tuple[str, ...]]
_RECOVERING = "RECOVERING"
"""State of a replica that was there before Serve's controller was."""
Loaded = tuple[tuple[Backend, ...], tuple[str, ...], tuple[str, ...], tuple[JwtKey, ...]]
"""All that a configuration is made from: backends, champions, models, keys."""


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
    ) -> None:
        self._ledger = ledger
        self._haproxy = haproxy
        self._settings = settings
        self._state_file = state_file
        self._states: States = {}
        self._seq = 0
        self._targets = Followed(fetch_targets, name="Serve", value=Targets(), interval_s=SERVE_INTERVAL_S)
        self._keys = Followed[tuple[JwtKey, ...]](
            fetch_keys, name="the issuer", value=(), interval_s=KEYS_INTERVAL_S
        )
        self._own_limits = OwnLimits()
        self._splits = RunningMap(haproxy, Path(settings.map_file))
        self._limits = {kind: RunningMap(haproxy, settings.limits.file(kind)) for kind in Limited}
        self._maps = (self._splits, *self._limits.values())
        self._loader = ThreadPoolExecutor(1, "loading")
        self._loading: tuple[Loaded, Future[None]] | None = None
        self._loaded: Loaded | None = None
        self._written: EdgeState | None = None

    def run(self, stopped: threading.Event) -> None:
        """Step until told to stop."""
        for status in ERROR_STATUSES:
            write_bytes(f"{self._settings.error_folder}/{status}.http", error_file(status).encode())
        try:
            while not stopped.is_set():
                stopped.wait(LEDGER_INTERVAL_S if self._step_or_stay() else ERROR_INTERVAL_S)
        finally:
            self._targets.stop()
            self._keys.stop()
            self._loader.shutdown()
            self._haproxy.stop()

    def _step_or_stay(self) -> bool:
        """A step; when it fails after a good one, a full disk say, what runs stays and the step is tried again."""
        try:
            self.step()
        except (OSError, FalajError) as error:
            if self._loaded is None:
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
        for source in (self._targets, self._keys):
            source.look(wait_s=FIRST_ANSWER_S if self._loaded is None else 0.0)
        wanted = routes(self._states, self._targets.value)
        self._bring_maps(wanted)
        if self._loaded is not None:
            self._write_state()
        self._bring_backends(wanted)
        if self._loading is None and self._haproxy.revive():
            LOG.warning("HAProxy had died and was started again")
        self._write_state()

    def _follow_ledger(self) -> None:
        try:
            if self._ledger.head() == self._seq:
                return
            for entry in self._ledger.entries(after=self._seq):
                event = entry.event()
                self._states = apply(self._states, event, time=entry.time)
                self._own_limits = self._own_limits.apply(event)
                self._seq = entry.seq
        except sa.exc.SQLAlchemyError as error:
            LOG.warning("the ledger cannot be read, the last state stays: %s", error)

    def _bring_maps(self, wanted: Routes) -> None:
        self._splits.bring(wanted.entries)
        for kind, running in self._limits.items():
            running.bring(self._own_limits.entries(kind, self._settings.limits.of(kind)))

    def _bring_backends(self, wanted: Routes) -> None:
        """Load what is new, in a thread, because a split that changes must not wait for it."""
        self._finish_loading()
        keys = self._keys.value
        loaded = (wanted.backends, wanted.champions, tuple(wanted.entries), keys)
        if self._loading is not None or loaded == self._loaded:
            return
        LOG.info("loading %s with keys %s", wanted, [key.kid for key in keys])
        for running in self._maps:
            running.note_changes()
        text = render(wanted, keys, self._settings)
        self._loading = loaded, self._loader.submit(self._haproxy.load, text)
        if self._loaded is None:
            wait([self._loading[1]])
            self._finish_loading()

    def _finish_loading(self) -> None:
        if self._loading is None or not self._loading[1].done():
            return
        loaded, loading = self._loading
        self._loading = None
        loading.result()
        for running in self._maps:
            running.tell_again()
        self._loaded = loaded

    def _write_state(self) -> None:
        names = [backend.name for backend in self._loaded[0]] if self._loaded else []
        state = EdgeState(applied_seq=self._seq, backends=names, pid=self._haproxy.pid)
        if state != self._written:
            write_state(self._state_file, state)
            self._written = state


def serve_targets(record: ClusterRecord, *, host: str | None) -> Callable[[], Targets]:
    """A function that asks Serve for each application's replicas.

    Args:
        record: of the running cluster.
        host: where the replicas listen, if not at the address that Serve publishes.
    """

    def fetch() -> Targets:
        request = urllib.request.Request(f"{record.dashboard_url}/api/serve/applications/")
        request.add_header("Authorization", f"Bearer {Path(record.token_path).read_text().strip()}")
        with urllib.request.urlopen(request, timeout=5) as response:
            return listed_targets(json.load(response), host=host)

    return fetch


def listed_targets(content: dict[str, Any], *, host: str | None) -> Targets:
    """The replicas' addresses in Serve's own description of its applications.

    Raises:
        ValueError: Serve's controller has been started again, and for a moment lists no address of replicas that run.
    """
    for name, app in content["applications"].items():
        for deployment in app["deployments"].values():
            if any(replica["state"] == _RECOVERING for replica in deployment["replicas"]):
                raise ValueError(f"its controller has started again and is still finding replicas of {name}")
    return {
        group["app_name"]: tuple(f"{host or target['ip']}:{target['port']}" for target in group["targets"])
        for group in content["target_groups"]
        if group["protocol"] == "HTTP" and group["app_name"] and group["targets"]
    }
