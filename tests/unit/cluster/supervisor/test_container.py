"""Tests of the program that runs a cluster in a container. `tests/image` runs it in a real container."""

from __future__ import annotations

from pathlib import Path

from cluster.node.locks import container_lock
from cluster.settings import StorageConfig
from cluster.supervisor import container
from tests.processes.commands import run_main


def test_second_container_with_the_same_volume_is_refused(tmp_path: Path) -> None:
    """It sees no process of the first container, and would take that cluster for a dead one."""
    with container_lock(StorageConfig(root=str(tmp_path))):
        result = run_main(container.main, f"storage.root={tmp_path}")
    assert result.returncode == 2
    assert "Another container runs the cluster" in result.stderr


def test_container_ends_with_the_exit_code_of_a_refused_start(tmp_path: Path) -> None:
    """An engine sees why the container ended, and no part of a cluster stays."""
    result = run_main(container.main, f"storage.root={tmp_path}", "cluster.edge_host=192.0.2.7")
    assert result.returncode == 2
    assert not (tmp_path / "cluster.json").exists()
