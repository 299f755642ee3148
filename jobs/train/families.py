"""Model families: the code that fits a model. `model.family` selects one; `model.module` names a user's own module.

A family is a module with two names:

    Parameters                     a dataclass of the family's hyper-parameters. If it has a field `precision` of type
                                   `cluster.runtime.Precision`, the ONNX graph that `fit` writes is registered with
                                   that precision.
    fit(dataset, parameters, context) -> None
                                   writes the model's files, `model.txt` (LightGBM) or `model.onnx`, into
                                   `context.folder`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from omegaconf import OmegaConf
from pyarrow.fs import FileSystem

from cluster.errors import ConfigError
from cluster.placement import Selector
from cluster.settings import ScalingConfig
from cluster.settings_conversion import load
from jobs.train.config import DeepSpeedConfig
from jobs.train.data import Dataset

BUILT_IN = {"lightgbm": "jobs.train.lightgbm", "tabular_network": "jobs.train.tabular_network.family"}
"""Module of each family of Falaj."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitContext:
    """Settings that `fit` needs in addition to the data and the parameters."""

    folder: Path
    """Folder for the model's files."""
    runs: str
    """Folder for Ray Train's checkpoints."""
    seed: int
    scaling: ScalingConfig
    """Number of workers, and the CPUs and GPUs of each worker."""
    deepspeed: DeepSpeedConfig
    run_name: str
    """Name of the Ray Train run."""
    selector: Selector = field(default_factory=dict)
    """Labels of the nodes where the fit may run."""
    file_system: FileSystem | None = None
    """File system of `runs`. None is this node's disk; then the selector names this node."""


class Family(Protocol):
    """The names that a module must have to be a model family."""

    Parameters: type[Any]

    def fit(self, dataset: Dataset, parameters: Any, context: FitContext) -> None:
        """Fit a model and write its files into `context.folder`."""
        ...


class ResolvedFamily(NamedTuple):
    """A family with validated parameters."""

    name: str
    module: Family
    parameters: Any
    """Instance of the module's `Parameters`."""
    runs_anywhere: bool
    """Whether another node than the command's can fit it: LightGBM's task returns its trees, and the network's
    checkpoints may be in the object store. A user's own family may write to this node's disk."""


def resolve_family(model: dict[str, Any]) -> ResolvedFamily:
    """Import the family and validate its parameters.

    Raises:
        ConfigError: The family is unknown, the module lacks one of the two names, or a parameter is wrong.
    """
    settings = dict(model)
    name, module_name = settings.pop("family", None), settings.pop("module", None)
    if not isinstance(name, str):
        raise ConfigError(
            "model.family is missing: choose `model=lightgbm` or `model=tabular_network`, or set model.family."
        )
    if module_name is None and name not in BUILT_IN:
        raise ConfigError(
            f"Unknown model family '{name}'. Known: {', '.join(BUILT_IN)}. For your own family set model.module."
        )
    module = _import(BUILT_IN[name] if module_name is None else module_name)
    parameters = load(OmegaConf.create(settings), module.Parameters)
    return ResolvedFamily(name, module, parameters, runs_anywhere=module_name is None)


def _import(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"model.module '{name}' cannot be imported: {error}.") from error
    for required in ("Parameters", "fit"):
        if not hasattr(module, required):
            raise ConfigError(
                f"model.module '{name}' has no '{required}'; see jobs/train/families.py for the protocol."
            )
    return module
