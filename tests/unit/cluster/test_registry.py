"""Tests of model versions and aliases as a projection of the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.artifact import open_file
from cluster.errors import ArtifactTampered, ModelNotFound, RefusedError
from cluster.ledger import Ledger
from cluster.ledger.events import ArtifactRefused, ClusterStopped, ModelRegistered, parse
from cluster.registry import Lineage, ModelVersion, Registry, verify_files
from cluster.runtime.loader import read_file
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyRevoked
from cluster.storage import Layout


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Ledger(f"sqlite:///{tmp_path}/ledger.db"), Layout(str(tmp_path)))


def keys(tmp_path: Path) -> Keyring:
    """Open or create the test's keyring."""
    path = tmp_path / "keyring.json"
    return Keyring(path, b"k" * 32) if path.exists() else Keyring.create(path, b"k" * 32)


def register(registry: Registry, tmp_path: Path, *, content: str = "{}", **changes: Any) -> ModelVersion:
    """Register the folder `built`, with a signature and trees."""
    source = tmp_path / "built"
    source.mkdir(exist_ok=True)
    (source / "model.json").write_text(content)
    (source / "model.txt").write_text("tree")
    lineage = Lineage(training_set_hash="abc", table_versions={"person": 3}, seed=7)
    details: dict[str, Any] = {"name": "m", "family": "lightgbm", "task": "binary", "lineage": lineage}
    return registry.register(
        source, store=keys(tmp_path), actor="user:a", **details | {"metrics": {"auc": 0.9}} | changes
    )


def test_versions_are_numbered_and_keep_their_lineage(registry: Registry, tmp_path: Path) -> None:
    register(registry, tmp_path)
    second = register(registry, tmp_path)
    assert second.version == 2
    assert registry.get("m", "latest") == second
    assert second.lineage.table_versions == {"person": 3}
    assert verify_files(second.uri, second.manifest_hash) == second.files


def test_model_files_are_encrypted_with_the_models_key(registry: Registry, tmp_path: Path) -> None:
    """They are bound to version and name, and the hashes are of the stored files."""
    first, second = (register(registry, tmp_path, content='{"word": "canary"}') for _ in range(2))
    stored = (Path(first.uri) / "model.json").read_bytes()
    assert b"canary" not in stored
    assert read_file(first, "model.json", keys(tmp_path)) == b'{"word": "canary"}'
    with pytest.raises(ArtifactTampered, match="version 1"):
        open_file(stored, name="m", version=second.version, part="model.json", store=keys(tmp_path))
    keys(tmp_path).revoke("models/m")
    with pytest.raises(KeyRevoked):
        read_file(first, "model.json", keys(tmp_path))


def test_rebuilt_projection_is_the_same(registry: Registry, tmp_path: Path) -> None:
    """Versions and aliases are the same before and after."""
    register(registry, tmp_path)
    register(registry, tmp_path)
    registry.move_alias("m", "champion", 2, actor="user:a", reason="first")
    registry.move_alias("m", "champion", 1, actor="user:a", reason="second")
    before = (registry.versions("m"), registry.aliases("m"), registry.get("m"))
    registry.rebuild()
    assert (registry.versions("m"), registry.aliases("m"), registry.get("m")) == before
    assert before[1] == {"champion": 1}


def test_registry_sees_another_ones_registration_at_once(registry: Registry, tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    other = Registry(ledger, Layout(str(tmp_path)))
    register(registry, tmp_path)
    ledger.append(ClusterStopped(cluster_id="c"), actor="user:a")
    assert other.versions("m") == [1]


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("mm", 1, "Did you mean 'm'"),
        ("m", 9, "no version 9"),
        ("m", "best", "'best' of model 'm' is neither a number nor an alias"),
        ("m", "LATEST", "Known: latest"),
    ],
)
def test_unknown_model_version_or_alias_lists_the_known_ones(
    registry: Registry, tmp_path: Path, name: str, version: int | str, message: str
) -> None:
    register(registry, tmp_path)
    with pytest.raises(ModelNotFound, match=message):
        registry.get(name, version)


@pytest.mark.parametrize("harm", ["change", "add", "remove", "manifest"])
def test_tampered_folder_is_refused_and_recorded(registry: Registry, tmp_path: Path, harm: str) -> None:
    """A changed, added or removed file is found before anything is parsed."""
    version = register(registry, tmp_path)
    folder = Path(version.uri)
    match harm:
        case "change":
            (folder / "model.txt").write_text("other")
        case "add":
            (folder / "extra.json").write_text("{}")
        case "remove":
            (folder / "model.txt").unlink()
        case "manifest":
            (folder / "manifest.json").write_text('{"files":{}}')
    with pytest.raises(ArtifactTampered):
        verify_files(version.uri, version.manifest_hash)
    with pytest.raises(ArtifactTampered):
        registry.check_files(version, actor="user:a")
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    assert [entry.payload["version"] for entry in ledger.entries(ArtifactRefused)] == [1]


def test_pickle_is_refused(registry: Registry, tmp_path: Path) -> None:
    """It can run code."""
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "model.pkl").write_bytes(b"")
    with pytest.raises(RefusedError, match=r"model\.pkl"):
        register(registry, tmp_path)
    assert registry.names() == []


def test_folder_of_a_crashed_registration_is_skipped(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "models" / "m" / "1").mkdir(parents=True)
    assert register(registry, tmp_path).version == 2
    assert registry.versions("m") == [2]


def test_versions_of_other_releases_can_be_read(registry: Registry) -> None:
    """Their lineage may lack a field, or have one that this release does not know."""
    event = ModelRegistered(
        name="n",
        version=1,
        family="f",
        task="binary",
        manifest_hash="",
        files={},
        lineage={"service": "s", "of_a_later_release": 1},
        metrics={},
    )
    registry._ledger.append(event, actor="tester")
    assert registry.get("n", "latest").lineage == Lineage(service="s")


def test_warnings_and_null_metrics_are_stored_with_a_version(registry: Registry, tmp_path: Path) -> None:
    """Metrics that are not finite become null. Events of older releases have no warnings."""
    metrics = {"auc": float("nan"), "bins": [{"rate": float("inf")}]}
    version = register(registry, tmp_path, metrics=metrics, warnings=["leak: input 'a'"])
    assert version.metrics == {"auc": None, "bins": [{"rate": None}]}
    assert version.warnings == ["leak: input 'a'"]
    event = ModelRegistered(
        name="n", version=1, family="f", task="binary", manifest_hash="", files={}, lineage={}, metrics={}
    )
    older = {name: value for name, value in event.payload().items() if name != "warnings"}
    read = parse("ModelRegistered", older, seq=1)
    assert isinstance(read, ModelRegistered)
    assert read.warnings == []
