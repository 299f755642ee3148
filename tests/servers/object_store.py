"""A double of S3: moto. It answers one request at a time.

With several threads, two writers sometimes both succeed in creating the same file.

    python -m tests.servers.object_store PORT ADDRESS
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.servers.ports import free_port

BUCKET = "falaj"


@contextlib.contextmanager
def object_store(host: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """Start the server with an empty bucket. Yield the environment variables of its clients.

    Args:
        host: Address to listen on.
    """
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed: nothing was tested against an S3 server")
    url = f"http://{host}:{free_port()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.object_store", url.rpartition(":")[2], host],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while not _answers(url):
            assert time.monotonic() < deadline, "moto did not start"
            time.sleep(0.1)
        request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        process.terminate()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def object_store_environment() -> Iterator[str]:
    """Start the server and set the environment variables in this process. Yield the URI of the bucket."""
    with object_store() as variables:
        previous = dict(os.environ)
        os.environ.update(variables)
        clients = fsspec.get_filesystem_class("s3")
        clients.clear_instance_cache()  # clients of an earlier server know its address
        try:
            yield f"s3://{BUCKET}"
        finally:
            os.environ.clear()
            os.environ.update(previous)


def main() -> None:
    """Serve on a port of an address."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app = DomainDispatcherApplication(create_backend_app)
    run_simple(sys.argv[2], int(sys.argv[1]), app, threaded=False)


if __name__ == "__main__":
    main()
