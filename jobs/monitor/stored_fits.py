"""Names of stored fits, and the check that a stored fit is the one that a monitoring run wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version as installed
from typing import NamedTuple

import numpy as np

from cluster.ledger import Ledger
from cluster.ledger.events import ModelMonitored
from cluster.registry import ModelVersion
from cluster.security.encryption.envelope import Identity
from cluster.storage import exists, read_bytes
from jobs.monitor.config import MonitorConfig

FORMAT = 1
"""Part of a fit's name. A change of how figures are computed needs another number, so that all are computed again."""
LIBRARIES = ("nannyml", "scikit-learn", "lightgbm", "pandas", "numpy")
"""A fit is used only with the versions of these packages that wrote it."""


class FitName(NamedTuple):
    """Name of a fit. Equal names mean equal fits."""

    model: str
    version: int
    digest: str

    @property
    def file(self) -> str:
        """Path relative to the monitor's folder of the model."""
        return f"fits/v{self.version}-{self.digest}.sealed"

    @property
    def identity(self) -> Identity:
        """Identity of the sealed file."""
        return Identity(artifact=f"monitor/{self.model}", version=self.version, part=self.file)


def typical_rows(served_rows: Sequence[int]) -> int:
    """Return the power of two that is nearest to the median number of rows of a chunk.

    The reference is cut into chunks of this size. It is rounded, so that a new chunk seldom needs another fit.
    """
    return int(2 ** round(float(np.log2(max(float(np.median(served_rows)), 1.0)))))


def fit_name(
    config: MonitorConfig, version: ModelVersion, *, reference_hash: str, served_rows: Sequence[int]
) -> FitName:
    """Return the name of the fit that monitoring needs.

    Args:
        config: Configuration of the run.
        version: The version.
        reference_hash: SHA-256 of the reference's file.
        served_rows: Numbers of rows of the served chunks.
    """
    content = {
        "format": FORMAT,
        "libraries": {name: installed(name) for name in LIBRARIES},
        "manifest": version.manifest_hash,
        "reference": reference_hash,
        "label": config.label,
        "timestamp": config.timestamp,
        "split": None if config.split is None else asdict(config.split),
        "rows": typical_rows(served_rows),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return FitName(version.name, version.version, digest[:32])


def stored_fit(folder: str, name: FitName, ledger: Ledger) -> bytes | None:
    """Return the stored bytes of a fit; None if there is none, or if the ledger does not have its SHA-256.

    Args:
        folder: The monitor's folder of the model.
        name: The fit.
        ledger: The ledger.
    """
    uri = f"{folder}/{name.file}"
    if not exists(uri):
        return None
    data = read_bytes(uri)
    digest = hashlib.sha256(data).hexdigest()
    events = ledger.find(ModelMonitored, newest_first=True, model=name.model, version=name.version)
    return data if any(entry.payload.get("fits", {}).get(name.digest) == digest for entry in events) else None
