"""A key broker in a thread with its own policy, and principals that are permitted or denied."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import AccessDenied, Unauthenticated
from cluster.security.keys.broker import Broker
from cluster.security.keys.client import BrokerKeyStore
from cluster.security.keys.gate import Denial, Gate, Operation
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from tests.servers.polling import wait_until

NAME = "features/income/personal"
INFO = KeyInfo(name=NAME, column_class="personal", purposes=("credit_scoring",))
OPEN = KeyInfo(name="features/income/internal", column_class="internal")
SECRET = b"a data key of thirty-two bytes.."


@dataclass(frozen=True)
class Person:
    """A principal."""

    subject: str
    purpose: str


@dataclass(frozen=True)
class Ruling:
    """A policy's decision."""

    allowed: bool
    policies: tuple[str, ...]


def verify(token: str) -> Person:
    """Return the principal of a token `subject/purpose`."""
    if token == "boom":
        raise RuntimeError("the verifier broke over secret-token")
    subject, slash, purpose = token.partition("/")
    if not slash:
        raise Unauthenticated("The token is not valid: no purpose.")
    return Person(subject, purpose)


def decide(principal: Person, operation: Operation, info: KeyInfo) -> Ruling:
    """Permit everything to admins. Others may use keys for their purpose, and manage internal keys."""
    if principal.subject == "broken":
        raise RuntimeError("the policy broke")
    if principal.subject == "strict":
        raise AccessDenied("strict is never allowed.")
    if principal.subject == "admin":
        return Ruling(True, ("admins",))
    if operation in (Operation.ensure, Operation.rotate, Operation.revoke):
        return Ruling(info.column_class == "internal", ("managing",))
    fits = not info.purposes or principal.purpose in info.purposes
    return Ruling(fits, ("purpose",) if fits else ())


@dataclass
class World:
    """A keyring, its broker, and the denials that were recorded."""

    path: Path
    ring: Keyring
    denials: list[Denial[Person]] = field(default_factory=list)

    def client(self, token: str = "admin/all") -> BrokerKeyStore:  # noqa: S107 (test data)
        return BrokerKeyStore(self.path, lambda: token, timeout_s=5.0)

    def gate(
        self, store: Any = None, *, audit: Callable[[Denial[Person]], None] | None = None
    ) -> Gate[Person]:
        """Return the gate, which checks access, for a key store. The default is the keyring."""
        return Gate(store or self.ring, verify=verify, decide=decide, audit=audit or self.denials.append)

    @contextmanager
    def serving(self, store: Any = None, *, audit: Any = None, **options: Any) -> Iterator[threading.Event]:
        broker = Broker(self.gate(store, audit=audit), self.path, **options)
        stopped = threading.Event()
        thread = threading.Thread(target=broker.run, args=(stopped,))
        thread.start()
        try:
            wait_until(self.path.is_socket)
            yield stopped
        finally:
            stopped.set()
            thread.join(20)
            assert not thread.is_alive()

    def raw(self, data: bytes) -> bytes:
        """Send bytes to the broker. Return what it sends until it closes the connection or sends nothing more."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(5.0)
            connection.connect(str(self.path))
            got = b""
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    got += part
            except OSError:
                pass
            return got


def answers(path: Path) -> bool:
    """Return whether a process listens at the path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


class Failing:
    """A fake key store that raises an error on each call."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def info(self, name: str) -> KeyInfo:
        raise self.error
