"""Files of one run in the object store, so that a process on any node finds them. Each file is encrypted.

Ray Train writes its checkpoints there. A checkpoint has traces of the training data. The key is random and is never
stored in the object store. It is in the memory of the run's processes, and in what Ray passes between them. So what a
killed run leaves in the object store cannot be decrypted later.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from fsspec import AbstractFileSystem
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from cluster.security.encryption.envelope import NONCE_BYTES, Identity, open_chunks, seal
from cluster.security.encryption.scratch import scratch_directory
from cluster.storage import Layout, file_system, local

KEEP_S = 30 * 86_400
"""A new run removes folders of this age in seconds, because killed runs leave theirs. A run must not last longer."""
_KEY, _ARTIFACT = "run", "run"


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A folder in which the processes of a run write files for each other."""

    path: str
    file_system: FileSystem | None = None
    """File system of the path. None is this machine's disk, which other nodes do not see."""


@contextlib.contextmanager
def run_folder(places: Layout, *, for_all_nodes: bool) -> Iterator[RunFolder]:
    """Yield a new folder, and remove it at the end.

    Args:
        places: The installation's folders.
        for_all_nodes: Whether processes on other nodes need the files. They are then in the object store, if there is
            one.
    """
    if places.shared is None or not for_all_nodes:
        with scratch_directory(local(places.runs)) as folder:
            yield RunFolder(path=str(folder))
        return
    base, parent = file_system(f"{places.shared}/runs")
    _remove_old(base, parent)
    path = f"{parent}/{int(time.time())}-{secrets.token_hex(8)}"
    sealed = SealedFiles(places.shared, RunKey(AESGCM.generate_key(256)))
    try:
        yield RunFolder(path=path, file_system=PyFileSystem(FSSpecHandler(sealed)))
    finally:
        with contextlib.suppress(FileNotFoundError):
            base.rm(path, recursive=True)


def _remove_old(base: AbstractFileSystem, parent: str) -> None:
    """Remove the folders that killed runs left. Their names begin with the time of the start."""
    with contextlib.suppress(FileNotFoundError):
        for path in base.ls(parent, detail=False):
            started = str(path).rstrip("/").rpartition("/")[2].partition("-")[0]
            if started.isdigit() and int(started) < time.time() - KEEP_S:
                base.rm(path, recursive=True)


@dataclass(frozen=True, slots=True)
class RunKey:
    """The part of a key store that envelopes need, for one key. Its text does not show the key."""

    secret: bytes = field(repr=False)
    """AES key of 32 bytes."""

    def wrap(self, name: str, secret: bytes) -> str:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return (nonce + AESGCM(self.secret).encrypt(nonce, secret, name.encode())).hex()

    def unwrap(self, name: str, wrapped: str) -> bytes:
        data = bytes.fromhex(wrapped)
        return AESGCM(self.secret).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], name.encode())


class SealedFiles(AbstractFileSystem):  # type: ignore[misc]
    """A file system that encrypts each file under its path. A file is in memory while it is written or read.

    Other processes receive it pickled. There it uses the object store with their own credentials.

    Args:
        root: URI of the object store.
        key: key of all files.
    """

    protocol = "sealed"
    cachable = False

    def __init__(self, root: str, key: RunKey, **options: Any) -> None:
        super().__init__(root=root, key=key, **options)
        self._base, self._store = file_system(root)[0], key

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        envelope: dict[str, Any] = {
            "store": self._store,
            "key": _KEY,
            "identity": Identity(artifact=_ARTIFACT, version=0, part=path),
        }
        if mode == "rb":
            with self._base.open(path, "rb") as source:
                return io.BytesIO(b"".join(open_chunks(source, **envelope)))
        if mode != "wb":
            raise ValueError(f"A sealed file is read or written as a whole, not opened with mode '{mode}'.")
        return _Unsealed(lambda data: self._write(path, data, envelope))

    def _write(self, path: str, data: io.BytesIO, envelope: dict[str, Any]) -> None:
        data.seek(0)
        with self._base.open(path, "wb") as target:
            seal(data, target, **envelope)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._base.ls(path, detail=detail, **options)

    def info(self, path: str, **options: Any) -> Any:
        return self._base.info(path, **options)

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        self._base.makedirs(path, exist_ok=True)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._base.makedirs(path, exist_ok=exist_ok)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._base.rm(path, recursive=recursive, maxdepth=maxdepth)


class _Unsealed(io.BytesIO):
    """The content of a file until it is closed and written.

    The first `close` writes it. After an error, or without a `close`, nothing is written, because the content may be
    incomplete.
    """

    def __init__(self, write: Callable[[io.BytesIO], None]) -> None:
        super().__init__()
        self._write: Callable[[io.BytesIO], None] | None = write

    def close(self) -> None:
        write, self._write = self._write, None
        try:
            if write is not None:
                write(self)
        finally:
            super().close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._write = None
        self.close()

    def __del__(self) -> None:
        self._write = None
        self.close()
