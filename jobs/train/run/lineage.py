"""Build the lineage of a model version: the data, code, configuration and seed that it was trained with."""

from __future__ import annotations

import dataclasses
import enum
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cluster.registry import Lineage
from cluster.storage import project_root
from jobs.train.config import TrainConfig
from jobs.train.data import TrainingSet

LIBRARIES = (
    "deepspeed",
    "lightgbm",
    "numpy",
    "onnx",
    "onnxruntime",
    "pyarrow",
    "ray",
    "scikit-learn",
    "torch",
)


def build_lineage(
    config: TrainConfig, source: TrainingSet, parameters: Any, *, sweep: Mapping[str, Any]
) -> Lineage:
    """Return the lineage of a training run. For `sweep` see `Lineage`."""
    manifest = source.manifest
    return Lineage(
        training_set_hash=source.hash,
        table_versions=manifest.get("table_versions", {}),
        service=manifest.get("service", ""),
        service_version=manifest.get("service_version", ""),
        git_commit=git_commit(),
        config=to_json_values(dataclasses.asdict(config))
        | {"parameters": to_json_values(dataclasses.asdict(parameters))},
        seed=config.seed,
        libraries=library_versions(),
        sweep=dict(sweep),
    )


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a model's weights depend on."""
    installed = {name: version(name) for name in LIBRARIES if _is_installed(name)}
    return {"python": platform.python_version()} | installed


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def git_commit() -> str:
    """Return the commit of the project folder.

    `+dirty` is appended if tracked files have local changes. The result is `unknown` outside a repository.
    """
    head = _git("rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}+dirty" if _git("status", "--porcelain", "--untracked-files=no") else head


def to_json_values(value: Any) -> Any:
    """Convert a configuration to JSON values. An enum becomes its value, a key becomes a string."""
    match value:
        case enum.Enum():
            return value.value
        case dict():
            return {str(key): to_json_values(item) for key, item in value.items()}
        case list() | tuple():
            return [to_json_values(item) for item in value]
        case _:
            return value


def _git(*arguments: str) -> str | None:
    try:
        # The current folder is not used: under `ray job submit` it is an uploaded copy without the repository.
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
