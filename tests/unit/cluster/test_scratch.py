"""Scratch folders: gone with their owner, also when it was killed, and never a living one's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.security.encryption import scratch as module
from cluster.security.encryption.disks import MEMORY, Mount
from cluster.security.encryption.scratch import memory_folder, scratch, sweep
from cluster.security.scan import scan

CANARY = "canary-of-a-category"
HOLDER = f"""
import sys; from pathlib import Path; from cluster.security.encryption.scratch import scratch
with scratch(Path(sys.argv[1])) as folder:
    (folder / "model.json").write_text({CANARY!r})
    print(folder, flush=True)
    sys.stdin.read()
"""


def holder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a scratch folder that holds the canary."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """By the next to come, or at the cluster's start."""
    killed, left = holder(tmp_path)
    living, held = holder(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [Path(one.path) for one in scan([left], [CANARY])], "the control"
    sweep(tmp_path)
    assert (left.exists(), held.exists()) == (False, True)
    with scratch(tmp_path):
        assert held.exists()
    living.communicate()
    assert list(scan([tmp_path], [CANARY])) == []
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    """The folder is private while it is there."""
    seen: list[Path] = []

    def fail() -> None:
        with scratch(tmp_path / "new") as folder:
            seen.append(folder.parent)
            assert folder.parent.stat().st_mode & 0o777 == 0o700
            assert list(folder.iterdir()) == []
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not seen[0].exists()


def test_folders_that_are_made_at_once_do_not_sweep_each_other(tmp_path: Path) -> None:
    """A folder is locked before anybody else looks."""
    lost: list[Path] = []

    def work() -> None:
        for _ in range(20):
            with scratch(tmp_path) as folder:
                (folder / "x").write_text("x")
                if not (folder / "x").exists():
                    lost.append(folder)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []


def test_what_an_earlier_release_left_is_swept_a_day_later(tmp_path: Path) -> None:
    """It had no locks, so a younger one may have an owner."""
    old, young = tmp_path / "tmpabc", tmp_path / "tmpdef"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    sweep(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_memory_is_used_where_it_is_ones_own_and_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody could have made the folder first."""
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(module, "MIN_FREE_BYTES", 1)
    assert memory_folder(otherwise=tmp_path / "disk") == tmp_path / "disk", (
        "no memory at all, if /tmp is on a disk"
    )
    kind = next(iter(MEMORY))
    monkeypatch.setattr(module, "mount_of", lambda folder: Mount(folder="/", device="0:1", kind=kind))
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
def test_another_users_folder_is_not_used(tmp_path: Path) -> None:
    """Its name below /tmp can be guessed; whoever made it first could exchange a checkpoint."""
    theirs = tmp_path / "falaj-runs-0"
    theirs.mkdir(mode=0o777)
    os.chown(theirs, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to user 65534"), scratch(theirs):
        pass
    assert list(theirs.iterdir()) == []


def test_a_folder_of_ones_own_is_closed_to_others(tmp_path: Path) -> None:
    """One that an earlier release left open."""
    own = tmp_path / "runs"
    own.mkdir()
    own.chmod(0o755)
    with scratch(own):
        assert own.stat().st_mode & 0o777 == 0o700
