"""Folders for sockets and keys: closed to other users, who can neither rename nor replace them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.security.private_folder import (
    ensure_private_folder,
    find_exposed_parent,
    find_exposure,
    remove_access_of_others,
)
from tests.processes.other_user import NOBODY, needs_root, start_as_nobody


def as_nobody(code: str, *words: str) -> tuple[int, str]:
    """Run Python code as another user of this machine; return its exit code and errors."""
    process = start_as_nobody(code, *words)
    _, errors = process.communicate(timeout=20)
    return process.returncode, errors


def test_folder_and_parents_are_created_private(tmp_path: Path) -> None:
    """Independent of the umask. A second call returns the same folder."""
    before = os.umask(0)
    try:
        folder = ensure_private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    assert ensure_private_folder(folder) == folder


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o777])
def test_folder_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    """The message names the required mode."""
    folder = tmp_path / "keys"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode 0700.*has mode {mode:04o}"):
        ensure_private_folder(folder)
    remove_access_of_others(folder)
    assert ensure_private_folder(folder) == folder


@needs_root
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/tmp")])
def test_folder_of_another_user_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Another user may guess the name and create the folder first."""
    folder = tmp_path / "falaj-1"
    make(folder)
    os.chown(folder, NOBODY, NOBODY, follow_symlinks=False)
    folder.chmod(0o700) if not folder.is_symlink() else None
    with pytest.raises(ConfigError, match=r"belongs to user 65534|is not a folder"):
        ensure_private_folder(folder)


def test_writable_parent_is_refused_unless_it_is_sticky(tmp_path: Path) -> None:
    """In a sticky folder such as /tmp, only the owner can rename an entry."""
    parent = tmp_path / "shared"
    parent.mkdir()
    parent.chmod(0o777)
    with pytest.raises(ConfigError, match=r"shared can be changed by others"):
        ensure_private_folder(parent / "keys")
    parent.chmod(0o1777)
    assert ensure_private_folder(parent / "keys") == parent / "keys"


@needs_root
def test_another_user_cannot_replace_the_folder(tmp_path: Path) -> None:
    """A real second user tries to rename it. In a writable parent, that succeeds."""
    runtime = Path("/tmp") / f"falaj-test-{os.getpid()}"
    code = "import os, sys; os.rename(sys.argv[1], sys.argv[1] + '-old'); os.mkdir(sys.argv[1])"
    try:
        keys = ensure_private_folder(runtime / "keys")
        exit_code, errors = as_nobody(code, str(keys))
        assert exit_code != 0
        assert "PermissionError" in errors
        assert keys.stat().st_uid == 0
        assert (find_exposure(runtime), find_exposed_parent(keys)) == (None, None)
        runtime.chmod(0o777)
        assert as_nobody(code, str(keys)) == (0, "")
        assert find_exposed_parent(keys) is not None
    finally:
        shutil.rmtree(runtime)
