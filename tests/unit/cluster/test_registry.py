"""Model versions and aliases as a projection of the ledger."""

from __future__ import annotations

from pathlib import Path

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
    """The test's keyring."""
    path = tmp_path / "keyring.json"
    return Keyring(path, b"k" * 32) if path.exists() else Keyring.create(path, b"k" * 32)


def register(registry: Registry, tmp_path: Path, *, name: str = "m", content: str = "{}") -> ModelVersion:
    source = tmp_path / "built"
    source.mkdir(exist_ok=True)
    (source / "model.json").write_text(content)
    (source / "model.txt").write_text("tree")
    lineage = Lineage(training_set_hash="abc", table_versions={"person": 3}, seed=7)
    return registry.register(
        source,
        name=name,
        family="lightgbm",
        task="binary",
        lineage=lineage,
        metrics={"auc": 0.9},
        store=keys(tmp_path),
        actor="user:a",
    )


def test_versions_count_up_and_keep_their_lineage(registry: Registry, tmp_path: Path) -> None:
    """The second registration is version 2, and what it came from can be read back."""
    register(registry, tmp_path)
    second = register(registry, tmp_path)
    assert second.version == 2
    assert registry.get("m", "latest") == second
    assert second.lineage.table_versions == {"person": 3}
    assert verify_files(second.uri, second.manifest_hash) == second.files


def test_model_files_are_sealed_under_the_models_key(registry: Registry, tmp_path: Path) -> None:
    """Each for its own version and name; the hashes are of what is stored."""
    one, two = (register(registry, tmp_path, content='{"word": "canary"}') for _ in range(2))
    stored = (Path(one.uri) / "model.json").read_bytes()
    assert b"canary" not in stored
    assert read_file(one, "model.json", keys(tmp_path)) == b'{"word": "canary"}'
    with pytest.raises(ArtifactTampered, match="version 1"):
        open_file(stored, name="m", version=two.version, part="model.json", store=keys(tmp_path))
    keys(tmp_path).revoke("models/m")
    with pytest.raises(KeyRevoked):
        read_file(one, "model.json", keys(tmp_path))


def test_a_dropped_projection_is_rebuilt_from_the_events(registry: Registry, tmp_path: Path) -> None:
    """Versions and aliases are the same before and after."""
    register(registry, tmp_path)
    register(registry, tmp_path)
    registry.move_alias("m", "champion", 2, actor="user:a", reason="first")
    registry.move_alias("m", "champion", 1, actor="user:a", reason="second")
    before = (registry.versions("m"), registry.aliases("m"), registry.get("m"))
    registry.rebuild()
    assert (registry.versions("m"), registry.aliases("m"), registry.get("m")) == before
    assert before[1] == {"champion": 1}


def test_two_registries_on_one_ledger_agree(registry: Registry, tmp_path: Path) -> None:
    """A reader in another process sees what was just registered."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    other = Registry(ledger, Layout(str(tmp_path)))
    register(registry, tmp_path)
    ledger.append(ClusterStopped(cluster_id="c"), actor="user:a")
    assert other.versions("m") == [1]


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("mm", 1, "Did you mean 'm'"),
        ("m", 9, "no version 9"),
        ("m", "best", "'best' of model 'm' is neither a number nor an alias"),
        ("m", "LATEST", "Known: latest"),
    ],
)
def test_what_is_not_there_is_named(
    registry: Registry, tmp_path: Path, name: str, version: int | str, said: str
) -> None:
    """Unknown model, version and alias each say what is known."""
    register(registry, tmp_path)
    with pytest.raises(ModelNotFound, match=said):
        registry.get(name, version)


@pytest.mark.parametrize("harm", ["change", "add", "remove", "manifest"])
def test_a_tampered_folder_is_refused(registry: Registry, tmp_path: Path, harm: str) -> None:
    """Whatever differs from what was registered is found before anything is parsed."""
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


def test_pickle_is_no_allowed_format(registry: Registry, tmp_path: Path) -> None:
    """A format that can run code is never registered."""
    source = tmp_path / "bad"
    source.mkdir()
    (source / "model.pkl").write_bytes(b"")
    with pytest.raises(RefusedError, match=r"model\.pkl"):
        registry.register(
            source,
            name="m",
            family="f",
            task="binary",
            lineage=Lineage(training_set_hash=""),
            metrics={},
            store=keys(tmp_path),
            actor="a",
        )
    assert registry.names() == []


def test_a_crash_before_the_event_leaves_no_version(registry: Registry, tmp_path: Path) -> None:
    """The folder of a registration that died is passed over by the next one."""
    (tmp_path / "models" / "m" / "1").mkdir(parents=True)
    assert register(registry, tmp_path).version == 2
    assert registry.versions("m") == [2]


def test_warnings_and_undefined_metrics_are_kept_with_a_version(registry: Registry, tmp_path: Path) -> None:
    """A metric that is not finite is null in the ledger; events of an older release have no warnings."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    version = registry.register(
        folder,
        name="m",
        family="f",
        task="binary",
        lineage=Lineage(training_set_hash=""),
        metrics={"auc": float("nan"), "bins": [{"rate": float("inf")}]},
        warnings=["leak: input 'a'"],
        store=keys(tmp_path),
        actor="a",
    )
    assert version.metrics == {"auc": None, "bins": [{"rate": None}]}
    assert version.warnings == ["leak: input 'a'"]
    event = ModelRegistered(
        name="n", version=1, family="f", task="binary", manifest_hash="", files={}, lineage={}, metrics={}
    )
    older = {name: value for name, value in event.payload().items() if name != "warnings"}
    read = parse("ModelRegistered", older, seq=1)
    assert isinstance(read, ModelRegistered)
    assert read.warnings == []
