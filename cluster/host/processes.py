"""Find and end exactly the processes that a cluster started.

Every process of a cluster inherits an environment variable with the cluster's id. So a process with a reused pid, or
another user's Ray, is never ended. Ray's workers overwrite their environment when they set their title. A worker is
found as a child of the cluster's processes or, if its parents have ended, by its open files in the cluster's folder.

The id is not secret, and root sees all processes. So processes of users other than root and the cluster's own user are
ignored, even if they have the id in their environment.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

import psutil

ID_VARIABLE = "FALAJ_CLUSTER_ID"
_UNASSIGNED = range(20_000, 30_000)


def find(cluster_id: str, *, owner: int | None = None) -> list[psutil.Process]:
    """Return a cluster's processes. In a job of the cluster, these include the job itself and its parents.

    Args:
        cluster_id: Id of the cluster.
        owner: Id of the user that runs the cluster. The default is the user of this process.
    """
    users = {os.geteuid() if owner is None else owner, 0}
    by_pid: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if users.issuperset(process.uids()) and _belongs(process, cluster_id):
                by_pid |= {member.pid: member for member in (process, *process.children(recursive=True))}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return list(by_pid.values())


def runtime_dir(cluster_id: str) -> str:
    """Return the path of a cluster's own folder for sockets. Ray's folder is below it.

    The path is short, because a Unix socket's path may have only about 100 characters. The folder is not below
    XDG_RUNTIME_DIR, because the system removes XDG_RUNTIME_DIR when the user logs out, and the cluster keeps running.
    """
    return f"/tmp/falaj-{cluster_id}"  # noqa: S108 (random, made with mode 0700, and checked)


def _belongs(process: psutil.Process, cluster_id: str) -> bool:
    environment = process.environ()
    if environment:
        # A driver in a user's shell also has files of the cluster open, but it is not a process of the cluster.
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
    """End a cluster's processes, except this process and its parents. Return the number of ended processes.

    The processes get SIGTERM and, after the grace time, SIGKILL. Ray's GCS gets its signal last, because a raylet
    without a GCS waits for the GCS instead of ending.

    Args:
        cluster_id: Id of the cluster.
        owner: Id of the user that runs the cluster. The default is the user of this process.
        grace_s: Seconds from SIGTERM to SIGKILL.
        only: Selects the processes to end.
    """
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}

    def targets() -> list[psutil.Process]:
        members = find(cluster_id, owner=owner)
        return [process for process in members if process.pid not in spared and _is_selected(process, only)]

    ended = _send(signal.SIGTERM, targets(), wait_s=grace_s, spare="gcs_server")
    ended |= _send(signal.SIGTERM, targets(), wait_s=grace_s)
    ended |= _send(signal.SIGKILL, targets(), wait_s=5.0)
    return len(ended)


def end_process(process: psutil.Process, *, grace_s: float) -> None:
    """End a process with SIGTERM and, after the grace time, SIGKILL. A stopped process gets SIGKILL at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_STOPPED:
            process.terminate()
            if not psutil.wait_procs([process], timeout=grace_s)[1]:
                return
        process.kill()
        psutil.wait_procs([process], timeout=5.0)


def exit_at_once() -> NoReturn:
    """End this process with exit code 0, without waiting for its threads. Its logs and output are written first."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _is_selected(process: psutil.Process, only: Callable[[psutil.Process], bool]) -> bool:
    try:
        return only(process)
    except psutil.NoSuchProcess:
        return False


def _send(
    number: signal.Signals, processes: list[psutil.Process], *, wait_s: float, spare: str = ""
) -> set[int]:
    """Send a signal to all processes except those named `spare`, wait until they end, and return their pids."""
    signalled = []
    for process in processes:
        try:
            if process.name() != spare:
                process.send_signal(number)
                signalled.append(process)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(signalled, timeout=wait_s)
    return {process.pid for process in signalled}


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a TCP port can be bound."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int, host: str) -> list[int]:
    """Return free TCP ports, below the ports that the kernel gives to clients.

    Raises:
        OSError: too few are free.
    """
    candidates = (port for port in random.sample(_UNASSIGNED, len(_UNASSIGNED)) if port_is_free(port, host))
    found = list(itertools.islice(candidates, count))
    if len(found) < count:
        raise OSError(
            errno.EADDRINUSE, f"no {count} free ports from {_UNASSIGNED.start} to {_UNASSIGNED.stop}"
        )
    return found


def port_answers(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a process listens on a TCP port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def listener_name(port: int) -> str:
    """Return the name and pid of the process that listens on a port, or "another process" if it is not visible."""
    process = _listener(port)
    return f"{process.name()} (pid {process.pid})" if process else "another process"


def cluster_of_listener(port: int) -> str | None:
    """Return the id of the cluster whose process listens on a port.

    Return "" if the process belongs to no cluster, and None if the process is not visible.
    """
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
