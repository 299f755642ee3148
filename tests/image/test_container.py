"""The image, run as a container, serves a client on another machine.

`make image-test` builds the image and runs these tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.image.build import PIP_FOLDER
from tests.image.container import NAME, PORT, STOP_S, USER_ID, Container, create, image_config, mounted
from tests.nodes.namespaces import Machine, network
from tests.projects import loan

START_S = 600.0
NETWORK = (
    *("model=tabular_network", "name=net", "training_set=loans.parquet", "label=repaid"),
    *("model.width=8", "model.depth=1", "model.epochs=1", "model.batch_size=64"),
)
"""Arguments of `jobs.train` for a training with DeepSpeed, which compiles an operator."""
IMAGE = os.environ.get("FALAJ_IMAGE", "")
pytestmark = [
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not IMAGE, reason="SKIPPED LOUDLY: no image in FALAJ_IMAGE; run `make image-test`"),
]


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client on another machine."""

    machine: Machine
    container: Container

    def call(self, path: str, body: Any = None, *, token: str = "") -> tuple[int, str]:
        """Send one request by name, over verified TLS. Return the status, 0 without an answer, and the body."""
        command = [
            *("curl", "--silent", "--show-error", "--max-time", "20", "--write-out", "\n%{http_code}"),
            *("--cacert", str(self.container.root / ".falaj" / "tls" / "ca.pem")),
            *("--resolve", f"{NAME}:{PORT}:{self.container.machine.address}"),
            *(["--header", f"Authorization: Bearer {token}"] if token else []),
            *([] if body is None else ["--data", json.dumps(body)]),
            f"https://{NAME}:{PORT}{path}",
        ]
        result = subprocess.run(self.machine.command(*command), check=False, capture_output=True, text=True)
        content, _, status = result.stdout.rpartition("\n")
        return int(status), content or result.stderr

    def connects(self, port: int) -> bool:
        """Return whether a port of the container accepts a connection."""
        command = ("curl", "--silent", "--max-time", "5", f"telnet://{self.container.machine.address}:{port}")
        result = subprocess.run(
            self.machine.command(*command), check=False, stdin=subprocess.DEVNULL, capture_output=True
        )
        return result.returncode != 7  # curl's code for a refused connection

    def predict(self, customer: int, *, token: str) -> tuple[int, str]:
        """Request the prediction for a customer."""
        return self.call(
            loan.PREDICT, {"entities": [{"customer_id": customer}], "as_of": loan.AS_OF}, token=token
        )


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """Mount the image's file system."""
    with mounted(IMAGE) as path:
        yield path


@pytest.fixture
def client(root: Path, tmp_path: Path) -> Iterator[Client]:
    """Return a client and a container on two machines of one network."""
    with network("container", "client") as machines:
        at = machines.machines
        options = [f"cluster.edge_names=[{NAME}]", "cluster.object_store_mib=256"]
        container = create(image=IMAGE, root=root, folder=tmp_path, machine=at["container"], options=options)
        yield Client(machine=at["client"], container=container)


def test_image_contains_no_state_and_no_settings_of_its_build(root: Path) -> None:
    """The build's index, certificates and packages are in no layer. At most empty mount points are left of them."""
    config = image_config(IMAGE)
    assert config["User"] == f"{USER_ID}:{USER_ID}"
    assert list(config["Volumes"]) == ["/data"]
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "cluster.status"]
    assert not any(name in entry for entry in config["Env"] for name in ("PIP_", "TOKEN", "SECRET"))
    assert list((root / "data").iterdir()) == []
    left = [root / "etc" / "pip.conf", *(root / PIP_FOLDER.removeprefix("/")).glob("**/*")]
    assert all(path.stat().st_size == 0 for path in left if path.is_file())


def test_container_trains_and_serves_a_client_outside(client: Client) -> None:
    """It runs as uid 1000 with a read-only root.

    A client on another machine gets a prediction over TLS with a token, and reaches no port but the edge's. A killed
    supervisor is started again. After the whole container was killed, the next container with the same volume serves
    the model again. SIGTERM ends it with exit code 0.
    """
    container = client.container
    with container.running() as process:
        wait_until_ready(client, process)
        assert container.execute("id", "-u", check=True).stdout.strip() == str(USER_ID)
        assert "Read-only file system" in container.execute("touch", "/opt/falaj/file").stderr
        loan.prepare(container)
        container.run("jobs.train", *NETWORK, check=True)
        token = new_token(container)
        first = client.predict(7, token=token)
        assert first[0] == 200, first
        assert 0 < json.loads(first[1])["predictions"][0]["probability"] < 1
        assert client.predict(7, token="")[0] == 401
        assert reachable_ports(container) == {PORT}
        assert client.connects(PORT)
        assert not client.connects(serve_port(container))
        kill_supervisor(container)
        wait_until_healthy(container)
    with container.running() as process:
        wait_until_ready(client, process)
        second = wait_for_prediction(client, process)
        assert json.loads(second)["predictions"] == json.loads(first[1])["predictions"]
        wait_until_healthy(container)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0, container.log.read_text()[-3000:]


def wait_until_ready(client: Client, process: subprocess.Popen[bytes]) -> None:
    """Wait until the edge answers the client, and the container's program has started everything."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if "up after" in client.container.log.read_text() and client.call("/v2/health/ready")[0] == 200:
            return
        time.sleep(2)
    raise AssertionError(f"the container is not ready: {client.container.log.read_text()[-3000:]}")


def wait_for_prediction(client: Client, process: subprocess.Popen[bytes]) -> str:
    """Wait until the model answers, and return its answer."""
    deadline, token = time.monotonic() + START_S, new_token(client.container)
    answer = (0, "")
    while time.monotonic() < deadline and process.poll() is None:
        answer = client.predict(7, token=token)
        if answer[0] == 200:
            return answer[1]
        time.sleep(2)
    raise AssertionError(f"the model is not served again: {answer}")


def new_token(container: Container) -> str:
    """Return a token for an application."""
    arguments = ("token", "--sub", "shop", "--role", "service", "--purpose", "credit_scoring")
    return container.run("cluster.security.identity", *arguments, check=True).stdout.strip()


def reachable_ports(container: Container) -> set[int]:
    """Return the ports on which a process of the cluster listens for other machines."""
    output = container.run("cluster.status", check=True).stdout
    assert "loopback" in output
    return {
        int(port) for port in re.findall(r"^ +\S+:(\d+) .*(?:EVERY ADDRESS|network),", output, re.MULTILINE)
    }


def serve_port(container: Container) -> int:
    """Return the port of Serve's proxy."""
    record = json.loads((container.root / ".falaj" / "cluster.json").read_text())
    return int(record["ports"]["serve_http"])


def kill_supervisor(container: Container) -> None:
    """Kill the process that restarts all others."""
    pid = (container.root / ".falaj" / "supervisor.lock").read_text().strip()
    container.execute("python", "-c", f"import os; os.kill({pid}, 9)", check=True)
    assert container.run("cluster.status").returncode == 1


def wait_until_healthy(container: Container) -> None:
    """Wait until all parts of the cluster run, and all models are restored."""
    deadline = time.monotonic() + START_S
    while container.run("cluster.status").returncode:
        assert time.monotonic() < deadline, container.run("cluster.status").stdout
        time.sleep(2)
