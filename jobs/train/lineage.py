"""What a model version came from: data, code, configuration, seed."""

from __future__ import annotations

import dataclasses
import enum
import subprocess
from typing import Any

from cluster.registry import Lineage
from cluster.storage import project_root
from jobs.train.config import TrainConfig
from jobs.train.data import TrainingSet


def lineage(config: TrainConfig, source: TrainingSet, parameters: Any) -> Lineage:
    """The lineage of a training run."""
    manifest = source.manifest
    return Lineage(
        training_set_hash=source.hash,
        table_versions=manifest.get("table_versions", {}),
        service=manifest.get("service", ""),
        service_version=manifest.get("service_version", ""),
        git_commit=git_commit(),
        config=plain(dataclasses.asdict(config)) | {"parameters": plain(dataclasses.asdict(parameters))},
        seed=config.seed,
    )


def git_commit() -> str:
    """The commit of the project's folder, with `+dirty` after local changes; `unknown` outside a repository."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}+dirty" if _git("status", "--porcelain", "--untracked-files=no") else head


def plain(value: Any) -> Any:
    """A configuration as JSON values."""
    match value:
        case enum.Enum():
            return value.value
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _:
            return value


def _git(*arguments: str) -> str | None:
    try:
        # Under `ray job submit` the current folder is an uploaded copy without its repository.
        result = subprocess.run(
            ["git", "-C", str(project_root()), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
