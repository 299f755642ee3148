"""Tests of scratch folders: they are removed with their owner, also after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.security.encryption import scratch as module
from cluster.security.encryption.disks import MEMORY_FILE_SYSTEMS, Mount
from cluster.security.encryption.scratch import memory_folder, remove_abandoned, scratch_directory
from cluster.security.scan import scan

CANARY = "canary-of-a-category"
HOLDER = f"""
import sys; from pathlib import Path; from cluster.security.encryption.scratch import scratch_directory
with scratch_directory(Path(sys.argv[1])) as folder:
    (folder / "model.json").write_text({CANARY!r})
    print(folder, flush=True)
    sys.stdin.read()
"""


def holder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process with a scratch folder that has the canary in a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_sweep_removes_only_folders_of_dead_processes(tmp_path: Path) -> None:
    """A new scratch folder and a cluster's start both sweep."""
    killed, left = holder(tmp_path)
    living, held = holder(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [Path(one.path) for one in scan([left], [CANARY])], "the control"
    remove_abandoned(tmp_path)
    assert (left.exists(), held.exists()) == (False, True)
    with scratch_directory(tmp_path):
        assert held.exists()
    living.communicate()
    assert list(scan([tmp_path], [CANARY])) == []
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_scratch_folder_is_private_and_removed_after_an_error(tmp_path: Path) -> None:
    seen: list[Path] = []

    def fail() -> None:
        with scratch_directory(tmp_path / "new") as folder:
            seen.append(folder.parent)
            assert folder.parent.stat().st_mode & 0o777 == 0o700
            assert list(folder.iterdir()) == []
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not seen[0].exists()


def test_concurrent_scratch_folders_do_not_remove_each_other(tmp_path: Path) -> None:
    """A folder is locked before other processes can see it."""

    def work() -> None:
        for _ in range(20):
            with scratch_directory(tmp_path) as folder:
                (folder / "x").write_text("x")
                assert (folder / "x").exists()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: work(), range(4)))


def test_folder_of_an_earlier_release_is_removed_after_a_day(tmp_path: Path) -> None:
    """Earlier releases had no locks, so a younger folder may have an owner."""
    old, young = tmp_path / "tmpabc", tmp_path / "tmpdef"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    remove_abandoned(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_memory_folder_must_be_private_and_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user could have created the folder first."""
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(module, "MIN_FREE_BYTES", 1)
    assert memory_folder(otherwise=tmp_path / "disk") == tmp_path / "disk", "if /tmp is on a disk"
    kind = next(iter(MEMORY_FILE_SYSTEMS))
    monkeypatch.setattr(module, "find_mount", lambda folder: Mount(folder="/", device="0:1", kind=kind))
    own = tmp_path / f"falaj-{os.geteuid()}"
    assert memory_folder(otherwise=tmp_path / "disk") == own
    own.chmod(0o755)
    assert memory_folder(otherwise=tmp_path / "disk") == tmp_path / "disk"
    shutil.rmtree(own)
    own.symlink_to(tmp_path)
    assert memory_folder(otherwise=tmp_path / "disk") == tmp_path / "disk"
    own.unlink()
    monkeypatch.setattr(module, "MIN_FREE_BYTES", 2**60)
    assert memory_folder(otherwise=tmp_path / "disk") == tmp_path / "disk"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    """Its name can be guessed, and its owner could replace a checkpoint."""
    theirs = tmp_path / "falaj-runs-0"
    theirs.mkdir(mode=0o777)
    os.chown(theirs, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to user 65534"), scratch_directory(theirs):
        pass
    assert list(theirs.iterdir()) == []


def test_own_folder_becomes_private(tmp_path: Path) -> None:
    """An earlier release may have left it open."""
    own = tmp_path / "runs"
    own.mkdir()
    own.chmod(0o755)
    with scratch_directory(own):
        assert own.stat().st_mode & 0o777 == 0o700
