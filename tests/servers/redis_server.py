"""A real redis-server for tests, on its own port. Tests are skipped with a message if redis-server is not installed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.servers.ports import free_port

START_DEADLINE_S = 10


@contextlib.contextmanager
def running_redis(*options: str, host: str = "127.0.0.1") -> Iterator[str]:
    """Yield the URL of a new, empty server that stores nothing on disk.

    Args:
        options: More command-line options of the server.
        host: Address to listen on.
    """
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("SKIPPED LOUDLY: no redis-server (Debian: apt install redis-server); Redis is not tested")
    port = free_port()
    folder = tempfile.mkdtemp(prefix="falaj-redis-")
    command = [binary, "--port", str(port), "--bind", host, "--protected-mode", "no", "--save", ""]
    command += ["--appendonly", "no"]
    process = subprocess.Popen([*command, "--dir", folder, *options], stdout=subprocess.DEVNULL)
    try:
        client, deadline = (
            redis.Redis(host=host, port=port, retry=Retry(NoBackoff(), 0)),
            time.monotonic() + START_DEADLINE_S,
        )
        while True:
            assert process.poll() is None, "redis-server ended"
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
        yield f"redis://{host}:{port}/0"
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)
