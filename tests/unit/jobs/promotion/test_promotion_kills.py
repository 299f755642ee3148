"""Imports and exports that are killed with SIGKILL, and imports that run at the same time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cluster.registry
from cluster.errors import RefusedError
from cluster.ledger.events import ModelExported, ModelRegistered
from tests.processes.forks import context
from tests.samples.installations import Installation
from tests.unit.jobs.promotion.test_promotion import SIGNATURE, write_trees

STEPS = ("model key", "first file", "second file", "manifest", "event")


def killed_at(step: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function. Its call number `step` ends this process, as kill -9 would."""
    calls = 0

    def call(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **more)

    return call


def import_until(root: Path, file: Path, step: int) -> None:
    """Import a bundle, and die before a step."""
    target = Installation(root=root)
    match STEPS[step]:
        case "model key":
            target.keyring.ensure = killed_at(1, target.keyring.ensure)  # type: ignore[method-assign]
        case "event":
            target.ledger.append = killed_at(1, target.ledger.append)  # type: ignore[method-assign]
        case _:
            write: Any = killed_at(step, cluster.registry.write_bytes)
            cluster.registry.write_bytes = write
    target.take(file)


def export_until_event(root: Path, output: Path) -> None:
    """Export a version, and die after the file was written under its temporary name."""
    source = Installation(root=root)
    source.ledger.append = killed_at(1, source.ledger.append)  # type: ignore[method-assign]
    source.export(output)


def import_once(root: Path, file: Path) -> None:
    """Import a bundle; exit 2 if it is refused."""
    try:
        Installation(root=root).take(file)
    except RefusedError as error:
        is_expected = "Another import runs" in str(error) or "is here already" in str(error)
        sys.exit(2 if is_expected else 1)


def end_of(target: Callable[..., None], *args: Any) -> int | None:
    process = context().Process(target=target, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of an installation in the same folder."""
    folder = tmp_path_factory.mktemp("source")
    source = Installation(root=folder / "a")
    write_trees(folder / "trees", SIGNATURE)
    source.register(folder / "trees")
    source.export(folder / "m.falaj")
    return folder / "m.falaj"


def importer(tmp_path: Path, file: Path) -> Installation:
    target = Installation(root=tmp_path / "b")
    target.trust(Installation(root=file.with_name("a")), "a")
    return target


def test_a_killed_import_leaves_no_version_and_can_be_repeated(tmp_path: Path, file: Path) -> None:
    """It is killed before each step that writes. The last import gives the only version."""
    target = importer(tmp_path, file)
    for step in range(len(STEPS)):
        assert end_of(import_until, target.root, file, step) == -signal.SIGKILL, STEPS[step]
        assert target.registry.names() == []
    target.take(file)
    [version] = target.registry.versions("m")
    target.registry.check_files(target.registry.get("m", version), actor="t")
    assert not list(Path(target.places.runs).glob("run-*"))


def test_of_imports_at_the_same_time_one_registers_the_version(tmp_path: Path, file: Path) -> None:
    """The others are refused."""
    target = importer(tmp_path, file)
    processes = [context().Process(target=import_once, args=(target.root, file)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert sorted(process.exitcode or 0 for process in processes) == [0, 2, 2, 2]
    assert len(list(target.ledger.entries(ModelRegistered))) == 1


def test_a_killed_export_leaves_no_bundle_under_its_name(tmp_path: Path, file: Path) -> None:
    """Without an event there is no file that could be imported, and the next export succeeds."""
    root, output = file.with_name("a"), tmp_path / "m.falaj"
    before = len(list(Installation(root=root).ledger.entries(ModelExported)))
    assert end_of(export_until_event, root, output) == -signal.SIGKILL
    assert not output.exists()
    assert len(list(Installation(root=root).ledger.entries(ModelExported))) == before
    Installation(root=root).export(output)
    assert output.exists()
