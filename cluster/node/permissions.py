"""Checks of owners and permissions of a cluster's files and folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from cluster.security.private_folder import find_exposed_parent, find_exposure
from cluster.session import ClusterRecord

PUBLIC_FILES = ("*.pub.pem", "jwks.json", "ca.pem", "node.pem", "*.log", "*.lock")
"""Name patterns of files below `keys/` and `tls/` that contain no secret."""


def permission_problems(record: ClusterRecord) -> list[str]:
    """Return one message for each path that gives other users access that they must not have.

    Checked are the state folder, keys, certificates, the edge's maps and logs, the folder for sockets and Ray's folder.
    Each folder above them is checked too, because a user who can rename a folder can replace it.
    """
    owner = record.owner
    storage, runtime = record.layout, Path(record.runtime_folder)
    problems = [problem for folder in _private_folders(record) for problem in _folder_problems(folder, owner)]
    for folder in map(Path, (storage.keys, storage.tls, storage.edge)):
        secret = str(folder) in (storage.keys, storage.tls)
        problems += _file_problems(_below(folder), owner, secret=secret)
    sockets = (path for path in _below(runtime) if not path.is_relative_to(record.temp_dir))
    problems += _file_problems(sockets, owner, secret=False)
    return list(dict.fromkeys(problems))


def _private_folders(record: ClusterRecord) -> list[Path]:
    storage, runtime = record.layout, Path(record.runtime_folder)
    folders = [runtime, Path(record.gcs_dir).parent if record.gcs_dir else runtime]
    # Every Ray driver makes Ray's own folder accessible to all users, so the parent folder must be private. In clusters
    # of earlier releases, Ray's folder and the folder for sockets are the same.
    if record.temp_dir != record.runtime_folder:
        folders.append(Path(record.temp_dir).parent)
    return [*folders, *(Path(folder) for folder in (storage.disk, storage.keys, storage.tls, storage.edge))]


def _folder_problems(folder: Path, owner: int) -> list[str]:
    try:
        return [
            problem
            for problem in (find_exposure(folder, owner=owner), find_exposed_parent(folder, owner=owner))
            if problem
        ]
    except FileNotFoundError:
        return [f"{folder} does not exist"]


def _file_problems(paths: Iterable[Path], owner: int, *, secret: bool) -> list[str]:
    return [problem for path in paths if (problem := _file_problem(path, owner, secret=secret))]


def _file_problem(path: Path, owner: int, *, secret: bool) -> str | None:
    try:
        status = path.lstat()
    except FileNotFoundError:  # removed since it was listed
        return None
    if stat.S_ISLNK(status.st_mode):
        return None
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in (owner, 0):
        return f"{path} belongs to user {status.st_uid}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be changed by others (mode {mode:04o})"
    public = any(fnmatch(path.name, pattern) for pattern in PUBLIC_FILES)
    readable = mode & (stat.S_IRGRP | stat.S_IROTH)
    if secret and readable and not public and stat.S_ISREG(status.st_mode):
        return f"{path} can be read by others (mode {mode:04o})"
    return None


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))
