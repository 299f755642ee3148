"""A registered version, for code that reads only its entry in the registry, and the event that registers one."""

from __future__ import annotations

from cluster.ledger.events import ModelRegistered
from cluster.registry import Lineage, ModelVersion


def model_version(
    lineage: Lineage | None = None, *, name: str = "m", version: int = 1, task: str = "binary"
) -> ModelVersion:
    """Return a version without files."""
    return ModelVersion(
        name=name,
        version=version,
        family="f",
        task=task,
        uri="",
        manifest_hash="",
        files={},
        lineage=lineage or Lineage(training_set_hash=""),
        metrics={},
    )


def registered(name: str, version: int) -> ModelRegistered:
    """Return the event of a version without files."""
    return ModelRegistered(
        name=name,
        version=version,
        family="f",
        task="binary",
        manifest_hash="",
        files={},
        lineage={},
        metrics={},
    )
