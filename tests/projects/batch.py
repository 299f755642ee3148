"""A project whose commands run in this process, without a cluster and without access checks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from omegaconf import OmegaConf

from cluster.ledger import Ledger
from cluster.security.acting import Actor
from cluster.security.keys.access import KeyAccess
from cluster.settings import OnlineConfig, StorageConfig
from cluster.settings_conversion import load
from feature_jobs.batches.multiple_views import for_each
from feature_jobs.ingest import IngestConfig, ingest
from feature_jobs.store.catalog.specifications import apply, load_definitions

KEY_FOLDERS = ("features/{}/internal", "online/{}/internal", "quarantine/{}/sensitive", "push/{}/sensitive")


def keys_of(*views: str) -> list[str]:
    """Return the names of the keys of some views. All fields of these views are internal."""
    return [folder.format(view) for view in views for folder in KEY_FOLDERS]


class BatchProject:
    """A storage root with a ledger, and a module of definitions that is written into the storage root."""

    def __init__(self, root: Path, access: KeyAccess, definitions: str, *, module: str) -> None:
        self.root, self.access, self.module = root, access, module
        self.storage = StorageConfig(root=str(root / ".falaj"))
        self.online = OnlineConfig(map_size_gib=0.5)
        self.actor = cast(Actor, SimpleNamespace(name="test", access=access, check=lambda *_: None))
        (root / ".falaj").mkdir()
        sys.path.insert(0, str(root))
        self.ledger = Ledger(f"sqlite:///{root}/.falaj/ledger.db")
        self.define(definitions)

    def define(self, definitions: str) -> None:
        """Write the module, and apply its definitions."""
        (self.root / f"{self.module}.py").write_text(definitions)
        sys.modules.pop(self.module, None)
        importlib.invalidate_caches()
        apply(load_definitions(self.module), self.ledger, actor="test")

    def ingest(self, *views: str, **given: Any) -> None:
        """Ingest views like `feature_jobs.ingest`. Paths are relative to the working directory of this process."""
        words = {"storage": {"root": self.storage.root}, "definitions": self.module, "num_buckets": 2}
        config = load(OmegaConf.create(words | {"view": list(views)} | given), IngestConfig)
        for_each(views, lambda view: ingest(config, self.ledger, self.actor, view))

    def close(self) -> None:
        """Close the ledger and remove the module."""
        self.ledger.engine.dispose()
        sys.path.remove(str(self.root))
        sys.modules.pop(self.module, None)
