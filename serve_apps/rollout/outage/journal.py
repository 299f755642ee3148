"""The journal: a file with the rollbacks that this machine decided while the ledger did not answer.

The file has a fixed size that is reserved while there is room, because a full disk is one reason why the ledger does
not answer. A rollback is one line, written in one call and flushed to disk. Each line has an HMAC. Reading stops at
the first line that is not complete or not authentic, so a kill at any byte leaves the rollbacks before it. A line that
was cut is overwritten by the next one.

One process writes the file: the controller of rollouts. The edge of the same machine reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from cluster.errors import ConfigError
from cluster.known_fields import known_fields
from cluster.security.edge_proof import edge_proof
from cluster.security.private_file import is_private
from cluster.storage import Layout, local

RESERVED_BYTES = 64 * 1024
_LABEL = b"falaj journal of rollbacks"
_NAME = "rollbacks.journal"


@dataclass(frozen=True, kw_only=True, slots=True)
class JournaledRollback:
    """A rollback that this machine decided while the ledger did not answer."""

    id: str
    """Random, so that it is appended to the ledger once."""
    model: str
    rollout: str
    version: int
    """The version that loses its units."""
    fallback: int | None
    """The champion that the last known event names. It answers all units."""
    reasons: list[str]
    evidence: dict[str, Any]
    """The counts of the decision."""
    decided_at: str


class Journal:
    """The file.

    Args:
        path: Path of the file. Its folder exists.
        key: Key of the HMAC.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self._path = path
        self._key = key
        self._lock = threading.Lock()

    def reserve(self) -> None:
        """Create the file with its full size, so that a rollback can be written to a full disk. Idempotent.

        Raises:
            OSError: The disk is full. A rollback can be written when there is room again.
        """
        with self._lock, self._open(os.O_RDWR | os.O_CREAT) as descriptor:
            missing = RESERVED_BYTES - os.fstat(descriptor).st_size
            if missing > 0:  # zeros are written, because a file with a hole has no room of its own
                _write_all(descriptor, bytes(missing), RESERVED_BYTES - missing)

    def read(self) -> tuple[JournaledRollback, ...]:
        """Return the rollbacks of the complete and authentic lines.

        Raises:
            ConfigError: Other users can write the file, or it is a link.
            OSError: The file cannot be read.
        """
        return self.parse(self.content())

    def content(self) -> bytes:
        """Return the bytes of the file; raises as `read` does."""
        try:
            with self._open(os.O_RDONLY) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return b""

    def parse(self, content: bytes) -> tuple[JournaledRollback, ...]:
        """Return the rollbacks in the file's content."""
        return tuple(
            JournaledRollback(**known_fields(JournaledRollback, orjson.loads(text)))
            for text in self._valid_texts(content)
        )

    def append(self, rollback: JournaledRollback) -> None:
        """Write a rollback, and flush it to disk.

        Raises:
            ConfigError: As for `read`.
            OSError: It could not be written. Nothing was decided.
        """
        line = self._line(orjson.dumps(asdict(rollback)))
        with self._lock:
            end = sum(len(self._line(text)) for text in self._valid_texts(self.content()))
            with self._open(os.O_RDWR | os.O_CREAT) as descriptor:
                _write_all(descriptor, line, end)

    def clear(self, settled: Sequence[JournaledRollback]) -> None:
        """Empty the file, unless it has other rollbacks than these.

        Raises:
            ConfigError, OSError: As for `append`.
        """
        with self._lock:
            if self.read() != tuple(settled):
                return
            size = len(self.content())
            with self._open(os.O_RDWR) as descriptor:
                _write_all(descriptor, bytes(size), 0)

    def _valid_texts(self, content: bytes) -> list[bytes]:
        texts = []
        for line in content.splitlines(keepends=True):
            mac, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or not hmac.compare_digest(mac, self._mac(text)):
                break
            texts.append(text)
        return texts

    def _line(self, text: bytes) -> bytes:
        return self._mac(text) + b" " + text + b"\n"

    def _mac(self, text: bytes) -> bytes:
        return hmac.new(self._key, text, hashlib.sha256).hexdigest().encode()

    @contextlib.contextmanager
    def _open(self, flags: int) -> Any:
        descriptor = os.open(self._path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if not is_private(os.fstat(descriptor), own=os.geteuid()):
                raise ConfigError(
                    f"Other users of this machine can use {self._path}, the journal of rollbacks. Remove it; it is "
                    "created again with mode 0600."
                )
            yield descriptor
        finally:
            os.close(descriptor)


def journal_of(places: Layout) -> Journal:
    """Return the journal of this machine. Its key is derived from the installation's secret.

    Raises:
        ConfigError: Other users can read the secret, or it is empty.
    """
    folder = local(places.edge)
    folder.mkdir(parents=True, exist_ok=True)
    key = hmac.new(edge_proof(places).encode(), _LABEL, hashlib.sha256).digest()
    return Journal(folder / _NAME, key)


def _write_all(descriptor: int, data: bytes, position: int) -> None:
    """Write all bytes at a position, and flush them to disk."""
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written
    os.fsync(descriptor)
