"""A version is trained again from its lineage: the recorded configuration, the rows, and the comparison."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from cluster.errors import RefusedError, TrainingSetError
from cluster.ledger import Ledger
from cluster.placement import ScalingConfig
from cluster.registry import Lineage, ModelVersion, Registry
from cluster.security.keys.keyring import Keyring
from cluster.storage import Layout
from jobs.train import lightgbm
from jobs.train.config import SplitConfig, TrainConfig
from jobs.train.data import TrainingSet
from jobs.train.reproduce import (
    ReproduceConfig,
    compare,
    find_training_set,
    require_same,
    require_trained_here,
    training_config,
)
from jobs.train.run.lineage import build_lineage, library_versions
from tests.samples.model_versions import model_version


def lineage(**changes: Any) -> Lineage:
    """Return the lineage that training records."""
    config = TrainConfig(
        name="loan",
        training_set="t.parquet",
        label="repaid",
        model={"family": "lightgbm", "learning_rate": 0.3},
        split=SplitConfig(column="customer_id"),
        seed=7,
        params_from="best.json",
        output="out.json",
        scaling=ScalingConfig(num_workers=3),
    )
    source = TrainingSet(table=None, manifest={}, hash="h")
    return replace(
        build_lineage(config, source, lightgbm.Parameters(rounds=40, learning_rate=0.1), sweep={}), **changes
    )


def test_training_gets_the_recorded_configuration() -> None:
    """The parameters are the resolved ones, also those of a sweep. Name and outputs are not repeated."""
    version = model_version(lineage(), name="loan")
    config = training_config(ReproduceConfig(reproduce="loan/1"), version, training_set="rebuilt.parquet")
    assert config.model["family"] == "lightgbm"
    assert (config.model["rounds"], config.model["learning_rate"]) == (40, 0.1)
    assert config.split.column == "customer_id"
    assert (config.seed, config.label, config.scaling.num_workers) == (7, "repaid", 3)
    assert (config.name, config.training_set) == ("loan-rebuilt", "rebuilt.parquet")
    assert config.params_from is config.output is None


def test_options_of_another_release_are_left_out() -> None:
    """An unknown option of the recorded configuration, such as the id of a run, is not repeated."""
    recorded = lineage().config | {"run": "loan-1", "unknown_option": 3}
    version = model_version(lineage(config=recorded), name="x" * 64)
    config = training_config(ReproduceConfig(reproduce="loan/1"), version, training_set="t")
    assert len(config.name) == 64
    assert config.name.endswith("-rebuilt")


def test_the_lineage_has_the_libraries() -> None:
    """So a reproduction can name those that differ."""
    assert {"python", "numpy", "lightgbm", "torch"} <= library_versions().keys()
    assert lineage().libraries == library_versions()
    assert Lineage(**asdict(lineage())) == lineage()


def test_only_versions_that_were_trained_here_are_reproduced() -> None:
    """Neither imported nor registered artifacts."""
    imported = replace(model_version(lineage()), origin={"installation": "staging"})
    with pytest.raises(RefusedError, match="imported from 'staging'"):
        require_trained_here(imported)
    with pytest.raises(RefusedError, match=r"not trained by `jobs\.train`"):
        require_trained_here(model_version(Lineage(config={"rows": "all", "training_set": "t"})))
    require_trained_here(model_version(lineage()))


@pytest.mark.parametrize("text", ["loan", "/1", "loan/"])
def test_a_version_needs_a_number(text: str) -> None:
    """Otherwise `latest` could be the copy of an earlier reproduction."""
    with pytest.raises(ValueError, match="<model>/<version>"):
        ReproduceConfig(reproduce=text)


def test_a_missing_training_set_without_manifest_is_refused(tmp_path: Path) -> None:
    """The message names both files."""
    version = model_version(lineage())
    files: Any = None
    config = ReproduceConfig(reproduce="m/1", training_set=str(tmp_path / "gone.parquet"))
    with pytest.raises(TrainingSetError, match=r"gone\.parquet and its manifest .*gone\.manifest\.json"):
        find_training_set(config, version, Ledger(f"sqlite:///{tmp_path}/l.db"), files)


def register(folder: Path, files: dict[str, bytes], **changes: Any) -> tuple[ModelVersion, Keyring]:
    """Register a version with these files."""
    source = folder / f"files-{len(list(folder.iterdir()))}"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    path = folder / "keyring.json"
    store = Keyring(path, b"k" * 32) if path.exists() else Keyring.create(path, b"k" * 32)
    settings: dict[str, Any] = {"metrics": {"auc": 0.8}, "lineage": lineage()}
    registry = Registry(Ledger(f"sqlite:///{folder}/l.db"), Layout(str(folder / "root")))
    version = registry.register(
        source, name="loan", family="f", task="binary", store=store, actor="t", **settings | changes
    )
    return version, store


def trees(*values: float) -> bytes:
    return f"tree\nnum_class=1\nleaf_value={' '.join(map(str, values))}\n".encode()


def test_equal_files_have_equal_contents(tmp_path: Path) -> None:
    """Although the encrypted files differ. A version of an older release has no such hashes; it is decrypted."""
    first, store = register(tmp_path, {"model.txt": trees(1, 2), "config.json": b"1"})
    second, _ = register(tmp_path, {"model.txt": trees(1, 2), "config.json": b"2"})
    assert first.files["model.txt"] != second.files["model.txt"]
    assert first.contents["model.txt"] == second.contents["model.txt"]
    for one in (first, replace(first, contents={})):
        event = compare(one, second, store, training_set="found")
        assert event.same_files == {"model.txt": True}
        assert event.largest_difference == 0.0
        assert event.metrics == event.libraries == {}
        require_same(event)


def test_differences_are_measured_and_refused(tmp_path: Path) -> None:
    """The message names files, metrics and libraries. Trees of another shape have no largest difference."""
    first, store = register(tmp_path, {"model.txt": trees(1, 2)})
    libraries = lineage().libraries | {"numpy": "0.1"}
    second, _ = register(
        tmp_path,
        {"model.txt": trees(1, 2.5)},
        metrics={"auc": 0.7},
        lineage=lineage(libraries=libraries, git_commit="other"),
    )
    event = compare(first, second, store, training_set="found")
    assert event.largest_difference == 0.5
    assert event.metrics == {"auc": [0.8, 0.7]}
    assert event.libraries.keys() == {"numpy", "code"}
    with pytest.raises(
        RefusedError, match=r"model\.txt, auc differ\. Libraries or code that differ: numpy, code"
    ):
        require_same(event)
    other, _ = register(tmp_path, {"model.txt": trees(1, 2, 3)})
    assert compare(first, other, store, training_set="found").largest_difference is None


def test_weights_of_networks_are_compared_number_by_number(tmp_path: Path) -> None:
    """The largest difference of all tensors counts."""
    weights = {"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float32)}
    first, store = register(tmp_path, {"model.safetensors": bytes(save(weights)), "model.onnx": b"x"})
    changed = weights | {"b": np.array([[1, 1], [1, 1.25]], np.float32)}
    second, _ = register(tmp_path, {"model.safetensors": bytes(save(changed)), "model.onnx": b"y"})
    event = compare(first, second, store, training_set="found")
    assert event.largest_difference == 0.25
    assert event.same_files == {"model.onnx": False, "model.safetensors": False}
