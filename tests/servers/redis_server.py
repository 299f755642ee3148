"""A real redis-server for tests, on its own port. Tests are skipped with a message if redis-server is not installed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.servers.ports import free_port

START_DEADLINE_S = 10


@dataclass(kw_only=True)
class Server:
    """A redis-server that can be killed and started again in its folder."""

    command: list[str]
    host: str
    port: int
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        client = redis.Redis(host=self.host, port=self.port, retry=Retry(NoBackoff(), 0))
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            assert self.process.poll() is None, "redis-server ended"
            try:
                client.ping()
            except redis.AuthenticationError:  # the server answers, but requires a password
                break
            except redis.ConnectionError:
                pass
            else:
                break
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)
        client.close()

    def kill(self) -> None:
        """Kill the server, as `kill -9` does."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running_redis(*options: str, host: str = "127.0.0.1") -> Iterator[str]:
    """Yield the URL of a new, empty server that stores nothing on disk.

    Args:
        options: More command-line options of the server.
        host: Address to listen on.
    """
    with server("--appendonly", "no", *options, host=host) as started:
        yield started.url


@contextlib.contextmanager
def server(*options: str, host: str = "127.0.0.1") -> Iterator[Server]:
    """Yield a new, empty server; the arguments are those of `running_redis`."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("SKIPPED LOUDLY: no redis-server (Debian: apt install redis-server); Redis is not tested")
    port = free_port()
    folder = tempfile.mkdtemp(prefix="falaj-redis-")
    command = [binary, "--port", str(port), "--bind", host, "--protected-mode", "no", "--save", ""]
    started = Server(command=[*command, "--dir", folder, *options], host=host, port=port)
    try:
        started.start()
        yield started
    finally:
        started.process.terminate()
        started.process.wait(10)
        shutil.rmtree(folder)
