"""Tests of version numbers, which several processes and machines reserve in one ledger database."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.reservations import reserve_number
from cluster.registry import Lineage, Registry
from cluster.runtime.loader import read_file
from cluster.security.keys.keyring import Keyring
from cluster.storage import Layout
from tests.processes import forks


def _keyring(folder: Path) -> Keyring:
    path = folder / "keyring.json"
    return Keyring(path, b"k" * 32) if path.exists() else Keyring.create(path, b"k" * 32)


def _register(url: str, root: str, folder: Path, *, count: int) -> list[int]:
    source = folder / "built"
    source.mkdir(exist_ok=True)
    (source / "model.json").write_text("{}")
    registry = Registry(Ledger(url), Layout(root))
    return [
        registry.register(
            source,
            name="m",
            family="lightgbm",
            task="binary",
            lineage=Lineage(training_set_hash="h"),
            metrics={},
            store=_keyring(folder),
            actor="user:a",
        ).version
        for _ in range(count)
    ]


def _register_all(url: str, root: str, folder: Path) -> None:
    _register(url, root, folder, count=5)


@pytest.mark.parametrize("same_disk", [True, False])
def test_two_processes_never_get_the_same_version(url: str, tmp_path: Path, same_disk: bool) -> None:
    """The numbers have no gaps, on one disk and on two machines with a disk each."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        _register(f"sqlite:///{folder}/other.db", str(folder / "other"), folder, count=1)
    roots = [str(tmp_path / "state"), str(tmp_path / ("state" if same_disk else "state-b"))]
    context = forks.context()
    processes = [
        context.Process(target=_register_all, args=(url, root, folder))
        for root, folder in zip(roots, folders, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert Registry(Ledger(url), Layout(roots[0])).versions("m") == list(range(1, 11))


def test_numbers_continue_after_versions_of_an_older_release(url: str, tmp_path: Path) -> None:
    """It reserved numbers as folders. A folder without a version is skipped, as before."""
    root = str(tmp_path / "state")
    assert _register(url, root, tmp_path, count=2) == [1, 2]
    ledger = Ledger(url)
    with ledger.writing() as connection:
        connection.exec_driver_sql("DROP TABLE reserved_numbers")
    (tmp_path / "state" / "models" / "m" / "3").mkdir()
    assert _register(url, root, tmp_path, count=2) == [4, 5]


def test_reserved_number_is_not_given_again(url: str) -> None:
    """Each name has its own numbers."""
    ledger = Ledger(url)
    numbers = [reserve_number(ledger, name, above=0) for name in ("models/a", "models/a", "models/b")]
    assert numbers == [1, 2, 1]
    assert reserve_number(ledger, "models/a", above=7) == 8


def test_versions_are_registered_on_a_remote_storage_root(tmp_path: Path) -> None:
    """Its files are written to the remote file system."""
    url, root = f"sqlite:///{tmp_path}/ledger.db", f"memory://{secrets.token_hex(4)}"
    assert _register(url, root, tmp_path, count=2) == [1, 2]
    version = Registry(Ledger(url), Layout(root)).get("m", 2)
    assert version.uri == f"{root}/models/m/2"
    assert read_file(version, "model.json", _keyring(tmp_path)) == b"{}"
