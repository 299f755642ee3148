"""Model families: which code fits a model, chosen by `model.family`, or a user's own module by `model.module`.

A family is a module with two names:

    Parameters                     a dataclass of its hyper-parameters; where it has a `precision` of type
                                   `cluster.runtime.Precision`, the graph that `fit` writes is registered as that
    fit(dataset, parameters, context) -> None
                                   writes its files, `model.txt` (LightGBM) or `model.onnx`, into `context.folder`
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from cluster.errors import ConfigError
from cluster.settings import ScalingConfig, load
from jobs.train.config import DeepSpeedConfig
from jobs.train.data import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class FitContext:
    """What a family needs beside the data and its parameters."""

    folder: Path
    """Where the model's files go."""
    runs: str
    """Where Ray Train keeps checkpoints."""
    seed: int
    scaling: ScalingConfig
    deepspeed: DeepSpeedConfig
    run_name: str


class Family(Protocol):
    """A module that fits models."""

    Parameters: type[Any]

    def fit(self, dataset: Dataset, parameters: Any, context: FitContext) -> None:
        """Fit and write the model's files."""
        ...


def resolve_family(model: dict[str, Any]) -> tuple[str, Family, Any]:
    """The family's name, its module and its validated parameters.

    Raises:
        ConfigError: an unknown family, a module without the two names, or a wrong parameter.
    """
    settings = dict(model)
    name, module_name = settings.pop("family", None), settings.pop("module", None)
    if not isinstance(name, str):
        raise ConfigError(
            "model.family is missing: choose `model=lightgbm` or `model=tabular_network`, or set it."
        )
    match name:
        case _ if module_name is not None:
            module = _import(module_name)
        case "lightgbm":
            module = _import("jobs.train.lightgbm")
        case "tabular_network":
            module = _import("jobs.train.tabular_network.family")
        case _:
            raise ConfigError(
                f"Unknown model family '{name}'. Known: lightgbm, tabular_network; for your own set model.module."
            )
    return name, module, load(OmegaConf.create(settings), module.Parameters)


def _import(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"model.module '{name}' cannot be imported: {error}.") from error
    for needed in ("Parameters", "fit"):
        if not hasattr(module, needed):
            raise ConfigError(
                f"model.module '{name}' has no '{needed}'; see jobs/train/families.py for the protocol."
            )
    return module
