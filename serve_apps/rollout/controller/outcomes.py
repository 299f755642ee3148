"""Reads predictions and outcomes for the metrics of running rollouts, with the rights of their starters.

It runs on the head, whose development issuer gives the tokens. With an OIDC issuer nobody reads outcomes, so a policy's
goals are never reached.
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import first_line
from cluster.ledger import Ledger
from cluster.ledger.store import utc_now
from cluster.registry import Registry
from cluster.runtime import Model
from cluster.runtime.loader import load_model, load_signature
from cluster.runtime.signature import ModelSignature
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.keys.store import KeyStore
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import TokenSource
from cluster.session import ClusterRecord
from cluster.storage import Layout
from serve_apps.rollout.controller.watching import compared_runs
from serve_apps.rollout.evidence.metric_rules import scoring_from_json
from serve_apps.rollout.evidence.outcomes import OutcomeReader, RolloutMetrics
from serve_apps.rollout.history import PolicyRun, read_running

EVERY_S = 5.0
MAX_COHORTS = 100
"""Largest number of cohorts of one rollout in one pass, so that one does not delay the others."""
LOG = logging.getLogger("falaj.rollouts")


@dataclass(frozen=True, slots=True)
class Versions:
    """Loads registered versions. The arguments are model, version and the key store."""

    signature: Callable[[str, int, KeyStore], ModelSignature]
    loaded: Callable[[str, int, KeyStore], Model]
    """Only paired metrics of a rollout whose version answers clients need it."""


def registered_versions(registry: Registry) -> Versions:
    """Return what loads versions from the registry."""
    return Versions(
        signature=lambda model, version, store: load_signature(registry.get(model, version), store),
        loaded=lambda model, version, store: load_model(registry.get(model, version), store),
    )


def keys_of(record: ClusterRecord, starter: dict[str, Any]) -> KeyStore:
    """Return the key store with the rights of a principal."""
    token = TokenSource(
        root=record.layout.disk,
        subject=str(starter["subject"]),
        role=Role(starter["role"]),
        purpose=str(starter["purpose"]),
    )
    return key_store(
        KeyAccess(
            socket=record.key_socket,
            token=token,
            owner=record.owner_uid,
            root=record.layout.disk,
            cluster_id=record.cluster_id,
        )
    )


class OutcomeCollector:
    """Adds the cohorts of units whose outcome window is over, for each running rollout with metrics.

    Args:
        ledger: The ledger.
        places: Where the logs are.
        versions: Loads signatures and models.
        keys: Returns the key store with the rights of a principal.
    """

    def __init__(
        self,
        ledger: Ledger,
        places: Layout,
        versions: Versions,
        keys: Callable[[dict[str, Any]], KeyStore],
    ) -> None:
        self._ledger = ledger
        self._places = places
        self._versions = versions
        self._keys = keys
        self._readers: dict[str, OutcomeReader] = {}
        self._failing: set[str] = set()

    def run(self, stopped: threading.Event) -> None:
        """Collect every few seconds until `stopped` is set. No failure ends it."""
        while not stopped.wait(EVERY_S):
            try:
                self.collect_once(now=utc_now())
            except Exception as error:  # noqa: BLE001 (without this thread, no goal would be reached)
                LOG.warning("the rollouts' outcomes could not be read: %s", first_line(error))

    def collect_once(self, *, now: dt.datetime) -> int:
        """Add all cohorts that are complete, and return their number. A failure of one rollout stops no other."""
        compared = compared_runs(read_running(self._ledger))
        running = {one.run.rollout: one for one in compared}
        self._readers = {rollout: reader for rollout, reader in self._readers.items() if rollout in running}
        added = 0
        for rollout, one in running.items():
            try:
                reader = self._readers.get(rollout) or self._new_reader(one.model, one.champion or 0, one.run)
                self._readers[rollout] = reader
                for _ in range(MAX_COHORTS):
                    if not reader.collect(now=now):
                        break
                    added += 1
            except Exception as error:  # noqa: BLE001 (any failure is tried again)
                if rollout not in self._failing:  # one line for each outage
                    LOG.warning(
                        "the outcomes of rollout %s could not be read: %s", rollout, first_line(error)
                    )
                self._failing.add(rollout)
            else:
                self._failing.discard(rollout)
        return added

    def _new_reader(self, model: str, champion: int, run: PolicyRun) -> OutcomeReader:
        store = self._keys(run.starter)

        @functools.cache
        def signature(version: int) -> ModelSignature:
            return self._versions.signature(model, version, store)

        @functools.cache
        def loaded(version: int) -> Model:
            return self._versions.loaded(model, version, store)

        metrics = RolloutMetrics(
            rollout=run.rollout,
            model=model,
            started_at=dt.datetime.fromisoformat(run.started_at),
            scoring=scoring_from_json(run.scoring),
            treatment=run.version,
            champion=champion,
        )
        return OutcomeReader(
            self._ledger,
            self._places,
            store,
            signatures=signature,
            metrics=metrics,
            models=loaded,
        )
