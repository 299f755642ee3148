"""What another user of this machine could do to a cluster's files, as far as permissions tell."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from cluster.security.private_folder import above, openness
from cluster.session import ClusterRecord
from cluster.storage import Layout, is_uri

PUBLIC = ("*.pub.pem", "jwks.json", "ca.pem", "node.pem", "*.log", "*.lock")
"""Names of files below `keys/` and `tls/` that hold no secret."""


def permission_problems(record: ClusterRecord) -> list[str]:
    """What is open to others and must not be, path by path; empty where all is as it should be.

    Checked are the state folder, keys, certificates, the edge's maps and logs, the folder for sockets, Ray's folder,
    and each folder above them, because who can rename one can put another in its place.
    """
    owner = record.owner
    places, runtime = Layout(record.storage_root), Path(record.runtime_folder)
    # Every driver opens Ray's own folder to all, so it must lie in one that is closed; in a cluster that an earlier
    # release started it is the folder for sockets.
    folders = [runtime, Path(record.gcs_dir).parent if record.gcs_dir else runtime]
    if record.temp_dir != record.runtime_folder:
        folders.append(Path(record.temp_dir).parent)
    if not is_uri(record.storage_root):
        folders += [Path(folder) for folder in (places.root, places.keys, places.tls, places.edge)]
    found = []
    for folder in folders:
        try:
            found += [
                problem for problem in (openness(folder, owner=owner), above(folder, owner=owner)) if problem
            ]
        except FileNotFoundError:
            found.append(f"{folder} does not exist")
    for folder in map(Path, (places.keys, places.tls, places.edge)):
        secret = str(folder) in (places.keys, places.tls)
        found += [
            problem for path in _below(folder) if (problem := _file_problem(path, owner, secret=secret))
        ]
    sockets = (path for path in _below(runtime) if not path.is_relative_to(record.temp_dir))
    found += [problem for path in sockets if (problem := _file_problem(path, owner, secret=False))]
    return list(dict.fromkeys(found))


def _file_problem(path: Path, owner: int, *, secret: bool) -> str | None:
    try:
        status = path.lstat()
    except FileNotFoundError:  # gone meanwhile
        return None
    if stat.S_ISLNK(status.st_mode):
        return None
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in (owner, 0):
        return f"{path} belongs to user {status.st_uid}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be changed by others (mode {mode:04o})"
    public = any(fnmatch(path.name, pattern) for pattern in PUBLIC)
    readable = mode & (stat.S_IRGRP | stat.S_IROTH)
    if secret and readable and not public and stat.S_ISREG(status.st_mode):
        return f"{path} can be read by others (mode {mode:04o})"
    return None


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))
