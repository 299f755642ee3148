"""What monitoring keeps of a reference: NannyML's calculators, fitted once for each version, and shares of values.

A fit is stored encrypted with the model's key, because it has values of the reference. It is a pickle, and a pickle
can run code when it is read. So it is read only if the ledger has its SHA-256, in the event of the monitoring run that
wrote it. Otherwise the version is fitted again.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from cluster.artifact import model_key
from cluster.ledger import Ledger
from cluster.ledger.events import ModelMonitored
from cluster.registry import ModelVersion
from cluster.security.encryption.envelope import Identity, open_bytes, seal_bytes
from cluster.security.keys.store import KeyStore
from cluster.storage import exists, read_bytes
from jobs.monitor.calculation.drift import fit_drift
from jobs.monitor.calculation.frames import Frames
from jobs.monitor.calculation.nannyml_api import StepResult
from jobs.monitor.calculation.performance import FittedCalculator, fit_calculator, fit_estimator
from jobs.monitor.calculation.reconstruction import fit_reconstruction
from jobs.monitor.calculation.shares import FittedShares, fit_shares
from jobs.monitor.config import MonitorConfig

FORMAT = 1
"""Part of a fit's name. A change of how figures are computed needs another number, so that all are computed again."""
LIBRARIES = ("nannyml", "scikit-learn", "lightgbm", "pandas", "numpy")
"""A fit is used only with the versions of these packages that wrote it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Everything that figures need of the reference of one version."""

    frames: Frames
    """Frames without rows: the task and the inputs."""
    estimator: StepResult
    calculator: FittedCalculator
    drift: dict[str, StepResult]
    reconstruction: StepResult
    shares: FittedShares


def fit_reference(frames: Frames) -> Fit:
    """Fit all calculators to the frames' reference."""
    return Fit(
        frames=replace(frames, reference=frames.reference.head(0), served=frames.served.head(0), chunks=[]),
        estimator=fit_estimator(frames),
        calculator=fit_calculator(frames),
        drift=fit_drift(frames),
        reconstruction=fit_reconstruction(frames),
        shares=fit_shares(frames),
    )


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
    from importlib.metadata import version as installed

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


def seal_fit(fit: Fit, name: FitName, store: KeyStore) -> bytes:
    """Return a fit as the encrypted bytes that are stored."""
    data = pickle.dumps(fit, protocol=5)
    return seal_bytes(data, store=store, key=model_key(name.model).name, identity=name.identity)


def open_fit(data: bytes, name: FitName, store: KeyStore) -> Fit:
    """Decrypt and unpickle a stored fit. The caller must have compared its SHA-256 with the ledger.

    Raises:
        ArtifactTampered: The file was altered, or is another fit.
    """
    fit: Any = pickle.loads(  # noqa: S301 - its SHA-256 is in the ledger
        open_bytes(data, store=store, key=model_key(name.model).name, identity=name.identity)
    )
    assert isinstance(fit, Fit)
    return fit


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
