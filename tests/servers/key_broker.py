"""A real key broker in a thread, for tests of code that needs keys. Its policy permits everything."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.keys.broker import Broker
from cluster.security.keys.gate import Gate
from cluster.security.keys.keyring import open_local
from cluster.security.keys.store import KeyInfo
from cluster.security.tokens.source import TokenSource
from tests.servers.polling import wait_until


@dataclass(frozen=True)
class Anybody:
    subject: str = "anybody"


@dataclass(frozen=True)
class Allowed:
    allowed: bool = True
    policies: tuple[str, ...] = ("everything",)


@contextlib.contextmanager
def running_broker(*keys: str) -> Iterator[KeyAccess]:
    """Run a broker with a new keyring that has these keys. Yield the access to the broker."""
    folder = Path(
        tempfile.mkdtemp(prefix="falaj-keys-")
    )  # short, because a socket's path may have at most 97 bytes
    (folder / "token").write_text("anything")
    (folder / "token").chmod(0o600)
    access = KeyAccess(
        socket=str(folder / "run" / "broker.sock"), token=TokenSource(file=str(folder / "token"))
    )
    gate = Gate(
        open_local(folder / "ring"),
        verify=lambda token: Anybody(),
        decide=lambda principal, operation, info: Allowed(),
        audit=lambda denial: None,
    )
    broker = Broker(gate, Path(access.socket))
    stopped = threading.Event()
    thread = threading.Thread(target=broker.run, args=(stopped,))
    thread.start()
    try:
        wait_until(Path(access.socket).exists)
        for name in keys:
            key_store(access).ensure(KeyInfo(name=name))
        yield access
    finally:
        stopped.set()
        thread.join()
        shutil.rmtree(folder)
