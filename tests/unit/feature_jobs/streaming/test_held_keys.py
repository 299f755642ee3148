"""Tests of the keys that a replica of `features` gets before it needs them."""

from __future__ import annotations

import copy
import threading

import pytest

from cluster.errors import AccessDenied
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.keys.client import BrokerKeyStore
from cluster.security.keys.store import KeyStoreUnavailable
from feature_jobs.store.online import store as online_store
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.streaming.push_tables import pushed_views
from feature_jobs.store.streaming.pusher import Pusher, open_push_log
from serve_apps.features.held_keys import HeldKeys
from tests.projects.push import PushProject, row


def test_replica_without_a_push_takes_pushes_while_the_head_is_down(
    project: PushProject, access: KeyAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It got the keys of the pushed views before. Their time in the cache is over."""
    project.push(row(1, 1, 5.0), key="a")
    replica, keys = copy.copy(project), key_store(access)
    replica.store = OnlineStore(project.store.engine, keys)
    replica.log = open_push_log(project.ledger, project.places, "income", keys)
    replica.pusher = Pusher(replica.view, replica.places, replica.store, replica.log)

    def hold(view: str) -> None:
        assert view == "income"
        replica.log.hold_key()
        replica.store.hold_keys(replica.view.spec)

    monkeypatch.setattr(online_store, "CACHE_S", 0.0)
    held = HeldKeys(hold, views=lambda: pushed_views(replica.ledger.engine))
    held.close()
    held.join()

    def away(*_: object, **__: object) -> object:
        raise KeyStoreUnavailable("the head does not answer")

    monkeypatch.setattr(BrokerKeyStore, "_request", away)
    assert replica.push(row(1, 2, 6.0), key="b")["accepted"] == 1
    assert replica.amounts(1) == [6.0]


def test_refused_keys_are_requested_once() -> None:
    """Each further request would be a denial in the ledger. An unavailable key store is asked again."""
    asked: list[str] = []
    enough = threading.Event()

    def hold(view: str) -> None:
        asked.append(view)
        if asked.count("away") == 3:
            enough.set()
        raise {"secret": AccessDenied("no"), "away": KeyStoreUnavailable("away")}[view]

    held = HeldKeys(hold, views=lambda: ["secret", "away"], every_s=0.0)
    assert enough.wait(10)
    held.close()
    held.join()
    assert asked.count("secret") == 1
