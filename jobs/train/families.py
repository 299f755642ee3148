"""Model families: the code that fits a model. `model.family` selects one; `model.module` names a user's own module.

A family is a module with `Parameters`, a dataclass of hyper-parameters, and one of these:

    build(signature, parameters), loss(outputs, target, signature)
                                   a network, see `jobs/train/network/protocol.py`. It is trained by row groups, with
                                   checkpoints, on several workers.
    fit(dataset, parameters, context) -> None
                                   gets all rows in memory, and writes the model's files, `model.txt` (LightGBM) or
                                   `model.onnx`, into `context.folder`.

A family with `fit` may also have

    fit_trial(data, parameters, context, report) -> None
                                   fits in this process, and reports validation losses while it does, so that a
                                   sweep can stop a bad trial early. Without it, a trial reports once, at its end.

If `Parameters` has a field `precision` of type `cluster.runtime.Precision`, the ONNX graph is registered with that
precision.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from pyarrow.fs import FileSystem

from cluster.errors import ConfigError
from cluster.placement import ScalingConfig, Selector
from cluster.settings_conversion import load
from jobs.train.config import CheckpointConfig, DeepSpeedConfig
from jobs.train.run.files import RunFiles

BUILT_IN = {
    "lightgbm": "jobs.train.lightgbm",
    "tabular_network": "jobs.train.tabular_network.family",
    "ft_transformer": "jobs.train.ft_transformer.family",
}
"""Module of each family of Falaj that is fitted to a training set."""
BUILT_IN_FOR_TEXT = {"decoder": "jobs.train.decoder.family"}
"""Module of each family of Falaj that is fitted to text files."""


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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    selector: Selector = field(default_factory=dict)
    """Labels of the nodes where the fit may run."""
    file_system: FileSystem | None = None
    """File system of `runs`. None is this node's disk; then the selector names this node."""
    files: RunFiles | None = None
    """Files of the run, for its checkpoints. None keeps no checkpoints."""
    claim: Any = None
    """Queue of `jobs.train.progress.claim_run`, which gets the losses. By default, a fit has a queue of its own."""


class ResolvedFamily(NamedTuple):
    """A family with validated parameters."""

    name: str
    module: Any
    """The module of the family."""
    parameters: Any
    """Instance of the module's `Parameters`."""
    runs_anywhere: bool
    """Whether another node than the command's can fit it: LightGBM's task returns its trees, and a network's
    checkpoints may be in the object store. A `fit` of a user's own may write to this node's disk."""

    @property
    def is_network(self) -> bool:
        """Whether the family has `build` and `loss`."""
        return is_network_family(self.module)


def resolve_family(model: dict[str, Any], *, reads_text: bool = False) -> ResolvedFamily:
    """Import the family and validate its parameters.

    Args:
        model: `family`, `module` and hyper-parameters.
        reads_text: Whether the command has text files for the family, and no training set.

    Raises:
        ConfigError: The family is unknown or not for this data, the module lacks a name of the protocol, or a
            parameter is wrong.
    """
    settings = dict(model)
    name, module_name = settings.pop("family", None), settings.pop("module", None)
    if not isinstance(name, str):
        raise ConfigError(
            "model.family is missing: choose `model=lightgbm` or `model=tabular_network`, or set model.family."
        )
    known, others = (BUILT_IN_FOR_TEXT, BUILT_IN) if reads_text else (BUILT_IN, BUILT_IN_FOR_TEXT)
    if module_name is None and name in others:
        data, command = ("a training set", "jobs.train") if reads_text else ("text files", "jobs.train_text")
        raise ConfigError(f"model={name} is fitted to {data}. Use `python -m {command}`.")
    if module_name is None and name not in known:
        raise ConfigError(
            f"Unknown model family '{name}'. Known: {', '.join(known)}. For your own family set model.module."
        )
    module = _import(known[name] if module_name is None else module_name)
    parameters = load(OmegaConf.create(settings), module.Parameters)
    runs_anywhere = module_name is None or is_network_family(module)
    return ResolvedFamily(name, module, parameters, runs_anywhere=runs_anywhere)


def _import(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"model.module '{name}' cannot be imported: {error}.") from error
    missing = _missing_name(module)
    if missing is not None:
        raise ConfigError(
            f"model.module '{name}' has no '{missing}'; see jobs/train/families.py for the protocol."
        )
    return module


def _missing_name(module: Any) -> str | None:
    """Return a name of the protocol that a module lacks, or None if it is a family."""
    if not hasattr(module, "Parameters"):
        return "Parameters"
    if is_network_family(module) or hasattr(module, "fit") or hasattr(module, "fit_rows"):
        return None
    if hasattr(module, "loss"):
        return "build"
    return "loss" if hasattr(module, "build") else "fit"


def is_network_family(module: Any) -> bool:
    """Return whether a module has the names of a network family."""
    return hasattr(module, "build") and hasattr(module, "loss")
