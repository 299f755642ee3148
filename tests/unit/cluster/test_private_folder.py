"""Folders for sockets and keys: closed to every other user, and not to be put in another one's place."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.security.private_folder import above, close_to_others, openness, private_folder

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_nobody(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python as another user of this machine."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no python3 that every user may run")
    return subprocess.run(
        [python, "-c", code, *words],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        cwd="/",
    )


def test_it_is_made_with_its_parents_for_its_owner_only(tmp_path: Path) -> None:
    """Whatever the umask is, and a second time it is the same."""
    before = os.umask(0)
    try:
        folder = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    assert private_folder(folder) == folder


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o777])
def test_one_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    """The message says the mode that it must have."""
    folder = tmp_path / "keys"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode 0700.*has mode {mode:04o}"):
        private_folder(folder)
    close_to_others(folder)
    assert private_folder(folder) == folder


@as_root
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/tmp")])
def test_one_that_another_user_made_first_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Its name can be guessed or read, so somebody may wait for it."""
    folder = tmp_path / "falaj-1"
    make(folder)
    os.chown(folder, NOBODY, NOBODY, follow_symlinks=False)
    folder.chmod(0o700) if not folder.is_symlink() else None
    with pytest.raises(ConfigError, match=r"belongs to user 65534|is not a folder"):
        private_folder(folder)


def test_a_parent_that_others_can_change_is_refused_unless_it_is_sticky(tmp_path: Path) -> None:
    """There everybody could rename it; in one like /tmp only its owner can."""
    parent = tmp_path / "shared"
    parent.mkdir()
    parent.chmod(0o777)
    with pytest.raises(ConfigError, match=r"shared can be changed by others"):
        private_folder(parent / "keys")
    parent.chmod(0o1777)
    assert private_folder(parent / "keys") == parent / "keys"


@as_root
def test_another_user_cannot_put_a_folder_in_its_place(tmp_path: Path) -> None:
    """What was done to Ray's folder, tried by a real second user; in an open folder it succeeds."""
    runtime = Path("/tmp") / f"falaj-test-{os.getpid()}"
    code = "import os, sys; os.rename(sys.argv[1], sys.argv[1] + '-old'); os.mkdir(sys.argv[1])"
    try:
        keys = private_folder(runtime / "keys")
        refused = as_nobody(code, str(keys))
        assert refused.returncode != 0
        assert "PermissionError" in refused.stderr
        assert keys.stat().st_uid == 0
        assert (openness(runtime), above(keys)) == (None, None)
        runtime.chmod(0o777)
        assert as_nobody(code, str(keys)).returncode == 0
        assert above(keys) is not None
    finally:
        shutil.rmtree(runtime)
