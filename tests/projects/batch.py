"""The commands of the feature store in this process, on a module of definitions. No cluster and no access checks."""

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
    """Return the keys of views whose fields are all internal."""
    return [folder.format(view) for view in views for folder in KEY_FOLDERS]


class BatchProject:
    """A storage root with a ledger, and the definitions of a module that is written into it."""

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
        """Write the module and apply it."""
        (self.root / f"{self.module}.py").write_text(definitions)
        sys.modules.pop(self.module, None)
        importlib.invalidate_caches()
        apply(load_definitions(self.module), self.ledger, actor="test")

    def ingest(self, *views: str, **given: Any) -> None:
        """Ingest views as `feature_jobs.ingest` does. Paths are relative to the working directory of this process."""
        words = {"storage": {"root": self.storage.root}, "definitions": self.module, "num_buckets": 2}
        config = load(OmegaConf.create(words | {"view": list(views)} | given), IngestConfig)
        for_each(views, lambda view: ingest(config, self.ledger, self.actor, view))

    def close(self) -> None:
        """Close the ledger and remove the module."""
        self.ledger.engine.dispose()
        sys.path.remove(str(self.root))
        sys.modules.pop(self.module, None)
