"""Finding and ending exactly the processes that a cluster started.

Every process of a cluster inherits an environment variable with the cluster's id, so neither a recycled pid nor
somebody else's Ray is ever touched. Ray's workers overwrite their environment when they set their title: those are
known by their parents or, when these are gone, by the files they hold open in the cluster's own temporary folder.

The id is no secret, and root sees everybody's processes. So a process of another user than the cluster's own is never
one of the cluster's, whatever its environment says.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable

import psutil

ID_VARIABLE = "FALAJ_CLUSTER_ID"


def find(cluster_id: str, *, owner: int | None = None) -> list[psutil.Process]:
    """The processes that belong to a cluster; also this one and those above it, where it is a job of the cluster.

    Args:
        cluster_id: whose.
        owner: the user that the cluster runs as; by default this process's.
    """
    users = {os.geteuid() if owner is None else owner, 0}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if users.issuperset(process.uids()) and _belongs(process, cluster_id):
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return list(found.values())


def runtime_dir(cluster_id: str) -> str:
    """A cluster's own folder for sockets, with Ray's folder below it; Unix socket paths end at about 100 characters.

    It does not lie below XDG_RUNTIME_DIR, which ends when its user logs out; a cluster does not.
    """
    return f"/tmp/falaj-{cluster_id}"  # noqa: S108 (random, made with mode 0700, and checked)


def _belongs(process: psutil.Process, cluster_id: str) -> bool:
    environment = process.environ()
    if environment:
        # A driver in somebody's shell has files of the cluster open, too, but is not the cluster's.
        return bool(environment.get(ID_VARIABLE) == cluster_id)
    folder = f"{runtime_dir(cluster_id)}/"
    return any(file.path.startswith(folder) for file in process.open_files())


def end(
    cluster_id: str,
    *,
    owner: int | None = None,
    grace_s: float = 8.0,
    only: Callable[[psutil.Process], bool] = lambda process: True,
) -> int:
    """End a cluster's processes, asking first; gives how many there were. This one and those above it are spared.

    Ray's GCS is asked last: a raylet that has lost it waits for it instead of ending.

    Args:
        cluster_id, owner: as `find`.
        grace_s: how long they are waited for before they are killed.
        only: which of them.
    """

    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}

    def those() -> list[psutil.Process]:
        found = find(cluster_id, owner=owner)
        return [process for process in found if process.pid not in spared and _holds(only, process)]

    ended = _send(signal.SIGTERM, those(), wait_s=grace_s, spare="gcs_server")
    ended |= _send(signal.SIGTERM, those(), wait_s=grace_s)
    ended |= _send(signal.SIGKILL, those(), wait_s=5.0)
    return len(ended)


def end_one(process: psutil.Process, *, grace_s: float) -> None:
    """End a process, asking first; one that is stopped cannot answer, and is killed at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_STOPPED:
            process.terminate()
            if not psutil.wait_procs([process], timeout=grace_s)[1]:
                return
        process.kill()
        psutil.wait_procs([process], timeout=5.0)


def _holds(only: Callable[[psutil.Process], bool], process: psutil.Process) -> bool:
    try:
        return only(process)
    except psutil.NoSuchProcess:
        return False


def _send(
    number: signal.Signals, processes: list[psutil.Process], *, wait_s: float, spare: str = ""
) -> set[int]:
    """Signal processes, but for those named `spare`, and wait until they are gone; gives their pids."""
    asked = []
    for process in processes:
        try:
            if process.name() != spare:
                process.send_signal(number)
                asked.append(process)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(asked, timeout=wait_s)
    return {process.pid for process in asked}


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a TCP port can be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens on a TCP port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def owner(port: int) -> str:
    """The process that listens on a port, as far as it can be seen."""
    process = _listener(port)
    return f"{process.name()} (pid {process.pid})" if process else "another process"


def cluster_on(port: int) -> str | None:
    """The id of the cluster whose process listens on a port; none where that cannot be seen, empty for a stranger."""
    process = _listener(port)
    try:
        return process.environ().get(ID_VARIABLE, "") if process else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _listener(port: int) -> psutil.Process | None:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    return None
