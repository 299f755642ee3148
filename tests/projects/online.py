"""Online stores with their keys, and their readers."""

from __future__ import annotations

from pathlib import Path

from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from cluster.settings import OnlineConfig
from cluster.storage import Layout
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.online.reader import FeatureReader, open_online_store
from feature_jobs.store.online.store import OnlineStore
from tests.projects.views import service_of

SMALL = OnlineConfig(map_size_gib=0.05)
"""Configuration of an LMDB store for few rows."""


def online_keys(folder: Path, *views: str) -> Keyring:
    """Create the keyring `keyring.json` with the keys for the online rows of some views."""
    keyring = Keyring.create(folder / "keyring.json", bytes(32))
    for view in views:
        for sensitivity in ("internal", "personal", "sensitive"):
            keyring.ensure(KeyInfo(name=f"online/{view}/{sensitivity}"))
    return keyring


def open_store(folder: Path, keys: Keyring, config: OnlineConfig = SMALL) -> OnlineStore:
    """Open an online store below a folder, for reading and writing."""
    return open_online_store(config, Layout(str(folder)), keys, readonly=False)


def reader_of(store: OnlineStore, *views: ViewSpec) -> FeatureReader:
    """Return a reader for a feature service with these views."""
    return FeatureReader(service_of(*views), store)
