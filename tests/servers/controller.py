"""A running edge controller with a real ledger, a real HAProxy, and a fake of Serve."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import LedgerEvent
from cluster.security.edge_proof import edge_proof
from cluster.security.tls.certificates import ensure_tls
from cluster.security.tokens.issuer import ensure_issuer
from cluster.security.tokens.oidc import KeySource
from cluster.security.tokens.principal import local_keys
from cluster.settings import PlatformConfig, StorageConfig
from cluster.storage import Layout
from serve_apps.edge.control.controller import Controller
from serve_apps.edge.control.edge_state import EdgeState
from serve_apps.edge.control.haproxy_process import HAProxy
from serve_apps.edge.haproxy.dashboard import TOKEN_VARIABLE
from serve_apps.edge.haproxy.keys import key_writer
from serve_apps.replica.edge_headers import edge_variables
from serve_apps.replica.targets import Targets
from serve_apps.rollout.outage.journal import Journal
from tests.samples.rollouts import DEPLOYED, STARTED
from tests.servers.edge import edge_settings
from tests.servers.polling import wait_until
from tests.servers.ports import free_port

ONE, TWO = "127.0.0.1:9", "127.0.0.1:10"
CHAMPION_ONLY = "m-v1|m-v1|champion|none|-|0|10000"
SPLIT = "m-v1|m-v2|challenger|r|s|2000|8000"


class Serve:
    """A fake of the function that fetches targets from Serve. It returns targets, raises an error, or waits."""

    def __init__(self) -> None:
        self.targets: Targets = {"m-v1": (ONE,), "m-v2": (TWO,), "outcomes": (ONE,)}
        self.error: Exception | None = None
        self.asked = 0
        self.answering = threading.Event()
        self.answering.set()

    def __call__(self) -> Targets:
        self.asked += 1
        self.answering.wait(20)
        if self.error is not None:
            raise self.error
        return self.targets


class Held(HAProxy):
    """HAProxy that waits before each load until the test allows the load."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.may_load, self.loading = threading.Event(), threading.Event()
        self.may_load.set()

    def load(self, text: str) -> None:
        self.loading.set()
        assert self.may_load.wait(20)
        super().load(text)


class Running:
    """A controller in a thread, with methods that inspect HAProxy.

    Args:
        root: Folder for the edge's files.
        short: Folder with a path short enough for sockets.
        ledger: The ledger to follow. None means a new one below the root.
        places: Layout with keys and certificates. None means new ones below the root.
    """

    def __init__(
        self, root: Path, short: Path, *, ledger: Ledger | None = None, places: Layout | None = None
    ) -> None:
        self.places = places = places or Layout(str(root))
        ensure_issuer(places)
        ensure_tls(places)
        self.settings = edge_settings(
            root, short, places, ports=(free_port(), free_port()), dashboard="127.0.0.1:9"
        )
        self.ledger = ledger or open_ledger(PlatformConfig(storage=StorageConfig(root=str(root))))
        self.serve = Serve()
        self.state_file = root / "state.json"
        self.haproxy_file = root / "haproxy.cfg"
        self.journal = Journal(root / "rollbacks.journal", b"key")
        self.begin()

    def tell(self, *events: LedgerEvent) -> int:
        return [self.ledger.append(event, actor="test").seq for event in events][-1]

    @property
    def state(self) -> EdgeState | None:
        return EdgeState(**json.loads(self.state_file.read_text())) if self.state_file.exists() else None

    @property
    def applied(self) -> int:
        return self.state.applied_seq if self.state else 0

    @property
    def backends(self) -> list[str]:
        return self.state.backends if self.state else []

    def add_app(self, app: str) -> None:
        """Add an application with a replica to Serve's targets, and wait until the edge has it."""
        self.serve.targets = {**self.serve.targets, app: (ONE,)}
        wait_until(lambda: app in self.backends)

    def tell_and_wait(self, *events: LedgerEvent, seconds: float = 15) -> int:
        """Append events, and wait until the edge has applied them."""
        seq = self.tell(*events)
        wait_until(lambda: self.applied == seq, seconds=seconds)
        return seq

    def wait_for_targets(self, times: int = 1) -> None:
        """Wait until the controller has read Serve's targets again."""
        asked = self.serve.asked
        wait_until(lambda: self.serve.asked >= asked + times)

    def split(self) -> str:
        """Return the model's map entry in the running HAProxy."""
        return entry_of(self.ask(f"show map {self.settings.map_file}"))

    def ask(self, command: str, address: str | None = None) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address or self.settings.admin_socket)
            connection.sendall(command.encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode()

    def begin(
        self, *, fetch_targets: Callable[[], Targets] | None = None, keys: KeySource | None = None
    ) -> None:
        """Create a controller and its HAProxy, with the files of earlier controllers. The controller is not started."""
        self.haproxy = Held(
            config=self.haproxy_file,
            admin_socket=Path(self.settings.admin_socket),
            access_folder=self.haproxy_file.with_name("access"),
            secrets={TOKEN_VARIABLE: "of-ray"} | edge_variables(edge_proof(self.places)),
        )
        self.controller = Controller(
            ledger=self.ledger,
            fetch_targets=fetch_targets or self.serve,
            fetch_keys=key_writer(keys or local_keys(self.places), self.haproxy_file.with_name("keys")),
            haproxy=self.haproxy,
            settings=self.settings,
            state_file=self.state_file,
            journal=self.journal,
            address=f"https://{self.settings.bind}",
        )
        self.stopped, self.handed_over = threading.Event(), threading.Event()
        self.thread = threading.Thread(
            target=self.controller.run, args=(self.stopped,), kwargs={"handed_over": self.handed_over}
        )

    def hand_over(self) -> None:
        self.handed_over.set()
        self.stop()

    def stop(self) -> None:
        """Stop the controller and its HAProxy."""
        self.stopped.set()
        self.thread.join(20)

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=f"{self.places.tls}/ca.pem")
        host, port = self.settings.bind.split(":")
        return http.client.HTTPSConnection(host, int(port), context=context, timeout=10)

    def ask_all(self, command: str) -> list[str]:
        """Return the answers of all workers of all masters, including old ones. There are at least two masters."""
        said = []
        masters = sorted(Path(self.settings.admin_socket).parent.glob("master-*.sock"))
        assert len(masters) > 1
        for master in masters:
            rows = [row.split() for row in self._processes_of(master).splitlines()]
            for worker in (row[0] for row in rows if len(row) > 1 and row[1] == "worker"):
                with contextlib.suppress(ConnectionError):  # the worker has just ended
                    said.append(self.ask(f"@!{worker} {command}", str(master)))
        return said

    def _processes_of(self, master: Path) -> str:
        """Return the list of a master's processes. A master that reloads refuses or resets connections for a moment."""
        for _ in range(100):
            with contextlib.suppress(ConnectionError):
                return self.ask("show proc", str(master))
            time.sleep(0.05)
        return self.ask("show proc", str(master))

    def close(self) -> None:
        self.serve.answering.set()
        self.haproxy.may_load.set()
        if self.thread.is_alive():
            self.stop()
        self.ledger.close()


def entry_of(shown: str) -> str:
    """Return the model's entry in the output of `show map`."""
    return next((line.split(" ")[2] for line in shown.splitlines() if " m " in line), "")


@contextlib.contextmanager
def new_controller(
    root: Path, *, ledger: Ledger | None = None, places: Layout | None = None
) -> Iterator[Running]:
    """Yield a controller that has not been started."""
    root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="falaj-controller-", dir="/tmp") as short:
        one = Running(root, Path(short), ledger=ledger, places=places)
        try:
            yield one
        finally:
            one.close()


@contextlib.contextmanager
def running_controller(root: Path) -> Iterator[Running]:
    """Yield a running controller. The ledger has a model with a rollout."""
    with new_controller(root) as one:
        one.thread.start()
        one.tell_and_wait(*DEPLOYED, STARTED)
        yield one
