"""Register a trained model as a version, and return the version as the command's result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cluster.ledger import Ledger
from cluster.registry import Lineage, ModelVersion, Registry
from cluster.security.acting import Actor
from cluster.security.keys.access import key_store
from cluster.storage import Layout, json_text, resolve, write_json
from jobs.train.run.lineage import to_json_values


class TrainedModel(NamedTuple):
    """A fitted and evaluated model, ready to be registered."""

    name: str
    family: str
    task: str
    folder: Path
    """Folder with the model's files."""
    lineage: Lineage
    metrics: dict[str, Any]
    warnings: list[str]


def register(trained: TrainedModel, ledger: Ledger, places: Layout, actor: Actor) -> ModelVersion:
    """Write the training configuration and the metrics into the model folder, and register the next version."""
    config = to_json_values(trained.lineage.config)
    (trained.folder / "config.json").write_text(json_text(config))
    (trained.folder / "metrics.json").write_text(json_text(trained.metrics))
    return Registry(ledger, places).register(
        trained.folder,
        name=trained.name,
        family=trained.family,
        task=trained.task,
        lineage=trained.lineage,
        metrics=trained.metrics,
        warnings=trained.warnings,
        store=key_store(actor.access),
        actor=actor.name,
    )


def write_output(version: ModelVersion, *, run: str | None, path: str | None) -> dict[str, Any]:
    """Return the result of a training command, and write it to a JSON file.

    Args:
        version: The registered version.
        run: Id of the run that registered it.
        path: The file; None writes no file.
    """
    output = {
        "name": version.name,
        "version": version.version,
        "family": version.family,
        "metrics": version.metrics,
        "warnings": version.warnings,
        "run": run,
    }
    if path is not None:
        write_json(resolve(path), output)
    return output
