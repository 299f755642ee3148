"""Folders that no other user of this machine can enter, rename or replace.

To protect a socket or key file, every folder above it must be protected too. A user who can write to one of these
folders can rename its entries and put other files in their place.
"""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

from cluster.errors import ConfigError


def ensure_private_folder(path: Path) -> Path:
    """Return a folder of this user with mode 0700. If the folder or a parent folder is missing, create it.

    Raises:
        ConfigError: the path is not a folder or belongs to another user, or other users can enter or rename it.
    """
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    problem = find_exposure(path) or find_exposed_parent(path)
    if problem is not None:
        raise ConfigError(
            f"The folder {path} must be a folder of mode 0700 that belongs to user {os.geteuid()}, below folders that "
            f"others cannot change, but {problem}. Correct that, or choose another folder."
        )
    return path


def remove_access_of_others(path: Path) -> None:
    """Remove the rights of other users on a folder, unless the folder belongs to another user."""
    status = path.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        path.chmod(stat.S_IMODE(status.st_mode) & ~0o077)


def find_exposure(path: Path, *, owner: int | None = None) -> str | None:
    """Return why another user can enter a folder, or None if only its owner can enter it.

    Args:
        path: the folder itself; a link is not accepted as a folder.
        owner: the required owner; this process's user by default.
    """
    owner = os.geteuid() if owner is None else owner
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is not a folder"
    if status.st_uid != owner:
        return f"{path} belongs to user {status.st_uid}"
    mode = stat.S_IMODE(status.st_mode)
    return f"{path} has mode {mode:04o}" if mode & 0o077 else None


def find_exposed_parent(path: Path, *, owner: int | None = None) -> str | None:
    """Return how another user can rename a path through a parent folder, or None if no parent allows it.

    In a folder with the sticky bit, such as /tmp, only the owner of an entry can rename it.
    """
    owner = os.geteuid() if owner is None else owner
    for folder in Path(os.path.realpath(path)).parents:
        status = folder.stat()
        if status.st_uid not in (owner, 0):
            return f"{folder} belongs to user {status.st_uid}"
        if _others_write(status, owner) and not status.st_mode & stat.S_ISVTX:
            return f"{folder} can be changed by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def find_change_by_others(path: Path) -> str | None:
    """Return how another user can change the content of a folder, or None if only its owner can. Others may read it."""
    status = path.stat()
    owner = os.geteuid()
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is not a folder"
    if status.st_uid not in (owner, 0):
        return f"{path} belongs to user {status.st_uid}"
    if _others_write(status, owner):  # also in a folder with the sticky bit, a new file can be another user's
        return f"{path} can be changed by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return find_exposed_parent(path)


def require_unchangeable(*folders: str | None, loads: str) -> None:
    """Require that no other user of this machine can change the content of folders.

    Args:
        folders: the folders; None is no folder.
        loads: what loads code or configurations from them, for the message.

    Raises:
        ConfigError: another user can change a folder, or there is no such folder.
    """
    for folder in folders:
        try:
            problem = None if folder is None else find_change_by_others(Path(folder))
        except OSError as error:
            problem = f"{folder} cannot be read: {error.strerror}"
        if problem is not None:
            raise ConfigError(
                f"{loads} loads code or configurations from the folder {folder}, so no other user may change it, but "
                f"{problem}. Correct that, or use another folder."
            )


def _others_write(status: os.stat_result, owner: int) -> bool:
    """Return whether users other than the owner may write to a folder.

    The owner's own group may write, because new folders are group-writable on systems with one group per user.
    """
    try:
        own_group = pwd.getpwuid(owner).pw_gid
    except KeyError:
        own_group = os.getegid()
    group = bool(status.st_mode & stat.S_IWGRP) and status.st_gid not in (own_group, 0)
    return group or bool(status.st_mode & stat.S_IWOTH)
