"""`python -m jobs.train reproduce=loan/3`: train a version again from its lineage, and compare both results.

The recorded configuration goes to the command `jobs.train`, under another model name. So what is tested is the command
that users run, and `latest` of the model stays the same. The copy is retired at once, because nobody is to deploy it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from cluster.command_line import given_names
from cluster.entrypoint import job
from cluster.errors import RefusedError, TrainingSetError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ModelReproduced, ModelRetired
from cluster.registry import ModelVersion, Registry
from cluster.runtime.loader import read_file
from cluster.runtime.signature import LIGHTGBM_FILE, NETWORK_FILE, ONNX_FILE, SIGNATURE_FILE, WEIGHTS_FILE
from cluster.security.acting import create_actor
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyStore
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.settings_conversion import load, to_plain
from cluster.storage import exists, layout, resolve, write_json
from feature_jobs import training_set as training_set_command
from feature_jobs.training_set import TrainingSetConfig, manifest_path
from jobs.train.config import TrainConfig
from jobs.train.data import read_training_set
from jobs.train.version_rows import has_no_split, recorded_training_set

COMPARED = (LIGHTGBM_FILE, ONNX_FILE, WEIGHTS_FILE, NETWORK_FILE, SIGNATURE_FILE)
"""Files that must be the same. The others have the name of the model and the time."""
SUFFIX = "-rebuilt"
MAX_NAME = 64
NOT_REPEATED = frozenset({"action", "name", "output", "params_from", "reproduce", "run", "training_set"})
"""Options of the first training that say nothing about the weights. The best parameters of a sweep are recorded."""


@dataclass(kw_only=True, slots=True)
class ReproduceConfig(PlatformConfig):
    """Configuration of one reproduction."""

    reproduce: str
    """Model and version, such as `loan/3`."""
    training_set: str | None = None
    """File with the rows that the version was trained on. None takes the recorded file. If it is missing, it is built
    again from its manifest."""
    entities: str | None = None
    """Entity rows to build the training set again. None takes the file that the manifest names."""
    output: str | None = None
    """File to write the comparison to, as JSON."""

    def __post_init__(self) -> None:
        name, _, number = self.reproduce.partition("/")
        if not name or not number:
            raise ValueError(f"reproduce must be <model>/<version>, such as loan/3, got '{self.reproduce}'.")


@job("reproduce", ReproduceConfig, timed=True)
def main(config: ReproduceConfig) -> dict[str, Any]:
    """Train one version again and compare."""
    from jobs.train.__main__ import main as train  # that module starts this one

    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.train")
    registry = Registry(ledger, layout(config.storage))
    name, _, number = config.reproduce.partition("/")
    version = registry.get(name, number)
    require_trained_here(version)
    rows = find_training_set(config, version, ledger, protected_files(actor.access))
    trained = train.function(training_config(config, version, training_set=rows.path))
    assert trained is not None
    copy = registry.get(trained["name"], trained["version"])
    retired = ModelRetired(
        name=copy.name, version=copy.version, reason=f"only trained to compare with {config.reproduce}"
    )
    ledger.append(retired, actor=actor.name)
    event = compare(version, copy, key_store(actor.access), training_set=rows.how)
    ledger.append(event, actor=actor.name)
    for line in describe(event):
        print(line, flush=True)
    if config.output is not None:
        write_json(resolve(config.output), event.payload())
    require_same(event)
    return event.payload()


class FoundRows(NamedTuple):
    """The training set, and where it comes from."""

    path: str
    how: str
    """`found`, or `rebuilt` from its manifest."""


def require_trained_here(version: ModelVersion) -> None:
    """Require a version that this installation trained.

    Raises:
        RefusedError: It was imported or registered as an artifact, so its training is not known here.
    """
    where = f"Version {version.version} of '{version.name}'"
    if version.origin:
        raise RefusedError(
            f"{where} was imported from '{version.origin['installation']}'. Reproduce it there."
        )
    if has_no_split(version) or "parameters" not in version.lineage.config:
        raise RefusedError(f"{where} was not trained by `jobs.train`, so its training cannot be repeated.")


def find_training_set(
    config: ReproduceConfig, version: ModelVersion, ledger: Ledger, files: Any
) -> FoundRows:
    """Return the training set with the recorded hash. If the recorded file is missing, build it again.

    Raises:
        TrainingSetError: The file has other rows, or is missing and cannot be built again.
    """
    path = config.training_set or recorded_training_set(version)
    expected, how = version.lineage.training_set_hash, "found"
    if not exists(resolve(path)):
        rebuild_training_set(config, path)
        how = "rebuilt"
    source = read_training_set(path, files, places=layout(config.storage), ledger=ledger)
    if source.hash != expected:
        raise TrainingSetError(
            f"{path} does not have the rows that version {version.version} of '{version.name}' was trained on: its "
            f"hash is {source.hash[:16]}, not {expected[:16]}. Move it away to build it again from its manifest, or "
            "name another file with `training_set=…`."
        )
    return FoundRows(path, how)


def rebuild_training_set(config: ReproduceConfig, path: str) -> None:
    """Build a missing training set again, with the command `feature_jobs.training_set`.

    Raises:
        TrainingSetError: Its manifest is missing, too.
    """
    manifest = manifest_path(resolve(path))
    if not exists(manifest):
        raise TrainingSetError(
            f"The training set {path} and its manifest {manifest} are missing. Restore one of them, or name a file "
            "with the same rows with `training_set=…`."
        )
    print(f"building {path} again from its manifest", flush=True)
    options = to_plain(config) | {"manifest": manifest, "entities": config.entities, "output": resolve(path)}
    training_set_command.main.function(load(OmegaConf.create(options), TrainingSetConfig))


def training_config(config: ReproduceConfig, version: ModelVersion, *, training_set: str) -> TrainConfig:
    """Return the recorded configuration of a version's training, for the running cluster.

    Sections of the platform are those of this command, but the number of workers is the recorded one: it can change the
    weights.
    """
    recorded = version.lineage.config
    platform = {section.name for section in fields(PlatformConfig)}
    own = {field.name for field in fields(TrainConfig)} - platform - NOT_REPEATED
    settings = {name: value for name, value in recorded.items() if name in own}
    model = {key: value for key, value in recorded["model"].items() if key in ("family", "module")}
    places = to_plain(config)
    if "scaling" in recorded and not any(name.startswith("scaling") for name in given_names()):
        places["scaling"] = recorded["scaling"]
    options = places | settings
    options |= {
        "name": version.name[: MAX_NAME - len(SUFFIX)] + SUFFIX,
        "training_set": training_set,
        "model": model | recorded["parameters"],
    }
    return load(OmegaConf.create(options), TrainConfig)


def compare(
    version: ModelVersion, copy: ModelVersion, store: KeyStore, *, training_set: str
) -> ModelReproduced:
    """Return the differences between a version and its copy."""
    names = [name for name in COMPARED if name in version.files or name in copy.files]
    same = {name: content(version, name, store) == content(copy, name, store) for name in names}
    libraries = _differences(version.lineage.libraries, copy.lineage.libraries)
    code = _differences({"code": version.lineage.git_commit}, {"code": copy.lineage.git_commit})
    return ModelReproduced(
        name=version.name,
        version=version.version,
        copy_name=copy.name,
        copy_version=copy.version,
        training_set=training_set,
        same_files=same,
        largest_difference=largest_difference(version, copy, store, same),
        metrics=_differences(version.metrics, copy.metrics),
        libraries=libraries | code,
    )


def content(version: ModelVersion, name: str, store: KeyStore) -> str | None:
    """Return the hash of a file's content; None if the version does not have the file.

    A version of an older release has no hash of the content, so its file is decrypted.
    """
    if name not in version.files:
        return None
    return version.contents.get(name) or hashlib.sha256(read_file(version, name, store)).hexdigest()


def largest_difference(
    version: ModelVersion, copy: ModelVersion, store: KeyStore, same: dict[str, bool]
) -> float | None:
    """Return the largest difference of a weight: of a network's weights, or of the values of the trees' leaves.

    The result is None if there are no such files, or the shapes or the trees are others.
    """
    name = next((one for one in (WEIGHTS_FILE, LIGHTGBM_FILE) if one in same), None)
    if name is None:
        return None
    if same[name]:
        return 0.0
    if name not in version.files or name not in copy.files:
        return None
    read = _network_weights if name == WEIGHTS_FILE else _leaf_values
    first, second = (read(read_file(one, name, store)) for one in (version, copy))
    if {key: value.shape for key, value in first.items()} != {
        key: value.shape for key, value in second.items()
    }:
        return None
    return max((float(np.abs(first[key] - second[key]).max(initial=0)) for key in first), default=0.0)


def describe(event: ModelReproduced) -> list[str]:
    """Return the comparison as lines of text."""
    files = ", ".join(f"{name} {'same' if same else 'DIFFERENT'}" for name, same in event.same_files.items())
    lines = [
        f"trained {event.name} version {event.version} again as {event.copy_name} version {event.copy_version}; its "
        f"training set was {event.training_set}",
        f"files: {files}",
    ]
    if event.largest_difference:
        lines.append(f"largest difference of a weight: {event.largest_difference:.3g}")
    for name, (before, after) in event.metrics.items():
        lines.append(f"metric {name}: {before} before, {after} now")
    for name, (before, after) in event.libraries.items():
        lines.append(f"{name}: {before or 'unknown'} before, {after or 'unknown'} now")
    return lines


def require_same(event: ModelReproduced) -> None:
    """Require that the copy has the same weights and metrics.

    Raises:
        RefusedError: It has not. The message names what differs.
    """
    different = [name for name, same in event.same_files.items() if not same] + list(event.metrics)
    if different:
        reason = f" Libraries or code that differ: {', '.join(event.libraries)}." if event.libraries else ""
        raise RefusedError(
            f"{event.name} version {event.version} was not reproduced: {', '.join(different)} differ.{reason} Compare "
            "the lines above."
        )


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    names = sorted(before.keys() | after.keys())
    return {
        name: [before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)
    }


def _network_weights(data: bytes) -> dict[str, Any]:
    from safetensors.numpy import load as load_weights

    return {name: np.asarray(value, dtype=np.float64) for name, value in load_weights(data).items()}


def _leaf_values(data: bytes) -> dict[str, Any]:
    """Return the values of the leaves of each tree of LightGBM's text format."""
    trees: dict[str, Any] = {}
    for line in data.decode(errors="replace").splitlines():
        if line.startswith("leaf_value="):
            values = line.removeprefix("leaf_value=").split()
            trees[str(len(trees))] = np.array(values, dtype=np.float64)
    return trees


if __name__ == "__main__":
    main()
