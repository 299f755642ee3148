"""The identity of a run: its id, its settings and its result, as the ledger has them.

A run is started with settings and data. The same id continues it with the same settings. A finished run is not run
again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.ledger.chain import to_json
from cluster.ledger.events import ModelRegistered, RunFailed, RunFinished, RunStarted
from cluster.settings import PlatformConfig
from jobs.train.run.lineage import to_json_values

_SETTINGS = (
    *("name", "label", "task", "deepspeed", "split", "inputs", "exclude", "validation_share"),
    *("max_categories", "outcome_window_days", "outcomes_until", "seed", "threshold", "label_permutation"),
)
"""Options that determine the model. The others may differ when a run continues, for example where it may run."""


class RunClaimed(ConfigError):
    """Another job has the run."""


class Finished(NamedTuple):
    """The result of a finished run."""

    version: int
    metrics: dict[str, Any]


def new_run_id() -> str:
    """Return an id for a run that the caller gave none."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def run_settings(
    config: PlatformConfig, family: str, parameters: Any, data_hash: str, **sections: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that determines the model, by dotted name.

    Args:
        config: Configuration of the command.
        family: Family of the model.
        parameters: Its hyper-parameters.
        data_hash: Hash of the data.
        sections: Further settings.
    """
    content = {name: value for name, value in to_json_values(asdict(config)).items() if name in _SETTINGS}
    content["model"] = to_json_values(asdict(parameters)) | {"family": family}
    content["data"] = {"hash": data_hash}
    return _flat(content | to_json_values(sections))


def check_settings(ledger: Ledger, *, model: str, run: str, settings: Mapping[str, Any]) -> bool:
    """Return whether the run was started before.

    Raises:
        ConfigError: The run was started with other settings or other data. The message names one that differs.
    """
    entry = ledger.newest(RunStarted, model=model, run=run)
    if entry is None:
        return False
    require_same_settings(entry.payload["settings"], settings, what=f"Run '{run}' of model '{model}'")
    return True


def require_same_settings(recorded: Mapping[str, Any], settings: Mapping[str, Any], *, what: str) -> None:
    """Require the settings with which a run was started.

    Raises:
        ConfigError: One differs. The message names it.
    """
    for name in sorted(recorded.keys() | settings.keys()):
        if to_json(recorded.get(name)) != to_json(settings.get(name)):  # the ledger has large numbers as text
            raise ConfigError(
                f"{what} was started with {name}={recorded.get(name)}, not {settings.get(name)}. Give the same "
                "settings and data, or another run=…"
            )


def find_finished(ledger: Ledger, *, model: str, run: str) -> Finished | None:
    """Return the result of a run, or None if it is not finished.

    A run that was killed after it had registered its version is finished, too.
    """
    finished = ledger.newest(RunFinished, model=model, run=run)
    if finished is not None:
        return Finished(finished.payload["version"], finished.payload["metrics"])
    for entry in ledger.find(ModelRegistered, newest_first=True, name=model):
        if entry.payload["lineage"].get("config", {}).get("run") == run:
            return Finished(entry.payload["version"], entry.payload["metrics"])
    return None


def record_started(
    ledger: Ledger, *, model: str, run: str, family: str, settings: Mapping[str, Any], actor: str
) -> None:
    """Record the start of a run. A second call changes nothing."""
    event = RunStarted(model=model, run=run, family=family, settings=dict(settings))
    ledger.append_once(event, actor=actor, model=model, run=run)


def record_finished(ledger: Ledger, *, model: str, run: str, result: Finished, actor: str) -> None:
    """Record the result of a run. A second call changes nothing."""
    event = RunFinished(model=model, run=run, version=result.version, metrics=result.metrics)
    ledger.append_once(event, actor=actor, model=model, run=run)


def record_failed(ledger: Ledger, *, model: str, run: str, reason: str, actor: str) -> None:
    """Record that a run ended without a model. The same id continues it."""
    ledger.append(RunFailed(model=model, run=run, reason=reason), actor=actor)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
