"""Folders that no other user of this machine can enter, rename or put in place of ours.

A socket or a key file is only as safe as every folder above it: who may write to one of them can rename what lies in it
and put something of their own there.
"""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

from cluster.errors import ConfigError


def private_folder(path: Path) -> Path:
    """A folder of this user's own with mode 0700; made if it does not exist, its parents too.

    Raises:
        ConfigError: it exists and others can enter it, it is somebody else's or no folder, or others can rename it.
    """
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    problem = openness(path) or above(path)
    if problem is not None:
        raise ConfigError(
            f"The folder {path} must be a folder of mode 0700 that belongs to user {os.geteuid()}, below folders that "
            f"others cannot change, but {problem}. Mend that, or choose another."
        )
    return path


def close_to_others(path: Path) -> None:
    """Take from others what they may do with a folder of this user's; somebody else's stays as it is."""
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        path.chmod(stat.S_IMODE(status.st_mode) & ~0o077)


def openness(path: Path, *, owner: int | None = None) -> str | None:
    """What lets another user into a folder; None where it is its owner's alone.

    Args:
        path: the folder itself; a link is no folder.
        owner: whose it must be; by default this process's user.
    """
    owner = os.geteuid() if owner is None else owner
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is no folder"
    if status.st_uid != owner:
        return f"{path} belongs to user {status.st_uid}"
    mode = stat.S_IMODE(status.st_mode)
    return f"{path} has mode {mode:04o}" if mode & 0o077 else None


def above(path: Path, *, owner: int | None = None) -> str | None:
    """What lets another user rename a file or folder by a folder above it; None where nothing does.

    In a folder with the sticky bit, /tmp for one, only the owner of an entry can rename it.
    """
    owner = os.geteuid() if owner is None else owner
    for folder in Path(os.path.realpath(path)).parents:
        status = folder.stat()
        if status.st_uid not in (owner, 0):
            return f"{folder} belongs to user {status.st_uid}"
        if _others_write(status, owner) and not status.st_mode & stat.S_ISVTX:
            return f"{folder} can be changed by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _others_write(status: os.stat_result, owner: int) -> bool:
    """Whether others than the owner may write to a folder. A group that is the owner's own does not count: where each
    user has one, new folders are writable to it."""
    try:
        own_group = pwd.getpwuid(owner).pw_gid
    except KeyError:
        own_group = os.getegid()
    group = bool(status.st_mode & stat.S_IWGRP) and status.st_gid not in (own_group, 0)
    return group or bool(status.st_mode & stat.S_IWOTH)
