"""What monitoring keeps of a reference: NannyML's calculators, fitted once for each version, and shares of values.

A fit is stored encrypted with the model's key, because it has values of the reference. It is a pickle, and a pickle
can run code when it is read. So it is read only if the ledger has its SHA-256, in the event of the monitoring run that
wrote it. Otherwise the version is fitted again.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import Any

from cluster.artifact import model_key
from cluster.security.encryption.envelope import open_bytes, seal_bytes
from cluster.security.keys.store import KeyStore
from jobs.monitor.calculation.drift import fit_drift
from jobs.monitor.calculation.frames import Frames
from jobs.monitor.calculation.nannyml_api import StepResult
from jobs.monitor.calculation.performance import FittedCalculator, fit_calculator, fit_estimator
from jobs.monitor.calculation.reconstruction import fit_reconstruction
from jobs.monitor.calculation.shares import FittedShares, fit_shares
from jobs.monitor.stored_fits import FitName


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
