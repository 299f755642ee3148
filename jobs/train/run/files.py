"""Files of a run below the storage root. Each file is encrypted with the model's key before it leaves memory.

A checkpoint is a folder. Its last file is the manifest, which names all its files. So a checkpoint without a manifest
is incomplete, and is skipped. Each attempt to write a checkpoint gets a folder of its own, so files of two attempts are
never mixed.

    training_runs/<model>/<run>/checkpoints/<epoch>-<step>-<best epoch>-<random>/<part>, manifest
    training_runs/<model>/<run>/best/<epoch>              weights of the best epoch
    training_runs/<model>/<run>/metrics/<epoch>-<step>    metrics of the steps before
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.artifact import model_key
from cluster.errors import ArtifactTampered
from cluster.security.encryption.envelope import Identity, open_bytes, seal_bytes
from cluster.security.keys.access import KeyAccess, key_store
from cluster.storage import exists, file_name, file_system, list_files, read_bytes, write_bytes

MANIFEST = "manifest"


class CheckpointName(NamedTuple):
    """Name of a checkpoint's folder. Names of later states are greater."""

    epoch: int
    """Epoch in which the run continues."""
    step: int
    """Steps of this epoch that are done."""
    best_epoch: int
    """Epoch with the best weights; -1 if no epoch is finished."""
    attempt: str

    def text(self) -> str:
        return f"{self.epoch:06}-{self.step:09}-{self.best_epoch + 1:06}-{self.attempt}"

    @classmethod
    def new(cls, *, epoch: int, step: int, best_epoch: int) -> CheckpointName:
        return cls(epoch, step, best_epoch, secrets.token_hex(4))

    @classmethod
    def parse(cls, text: str) -> CheckpointName | None:
        """Return the name of a folder, or None if it is not a checkpoint's."""
        parts = text.split("-")
        if len(parts) != 4 or not all(part.isdigit() for part in parts[:3]):
            return None
        return cls(int(parts[0]), int(parts[1]), int(parts[2]) - 1, parts[3])


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """The folder of a run, as plain data for workers."""

    root: str
    """Path or URI of the folder."""
    model: str
    run: str
    access: KeyAccess

    def write(self, path: str, content: bytes) -> None:
        """Encrypt and write one file, completely or not at all."""
        store, identity = key_store(self.access), self._identity(path)
        sealed = seal_bytes(content, store=store, key=model_key(self.model).name, identity=identity)
        write_bytes(f"{self.root}/{path}", sealed)

    def read(self, path: str) -> bytes:
        """Read and decrypt one file.

        Raises:
            ArtifactTampered: The file is cut off, altered, or belongs to another path or run.
            FileNotFoundError: There is no such file.
        """
        store, identity = key_store(self.access), self._identity(path)
        sealed = read_bytes(f"{self.root}/{path}")
        return open_bytes(sealed, store=store, key=model_key(self.model).name, identity=identity)

    def exists(self, path: str) -> bool:
        """Return whether a file is complete."""
        return exists(f"{self.root}/{path}")

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted."""
        paths = list_files(f"{self.root}/{folder}")
        names = [path.rstrip("/").rpartition("/")[2] for path in paths]
        return [name for name in names if not name.endswith(".tmp")]

    def remove(self, path: str) -> None:
        """Remove a file or a folder, if it exists."""
        fs, full_path = file_system(f"{self.root}/{path}")
        with contextlib.suppress(FileNotFoundError):
            fs.rm(full_path, recursive=True)

    def remove_state(self) -> None:
        """Remove the checkpoints and weights of a finished run. Its metrics stay."""
        self.remove("checkpoints")
        self.remove("best")

    def checkpoints(self) -> list[CheckpointName]:
        """Return the folders of checkpoints, also of incomplete ones, the newest first."""
        names = [CheckpointName.parse(name) for name in self.names("checkpoints")]
        return sorted((name for name in names if name is not None), reverse=True)

    def _identity(self, path: str) -> Identity:
        return Identity(artifact=f"training_runs/{self.model}/{self.run}", version=0, part=path)


def run_files(root: str, *, model: str, run: str, access: KeyAccess) -> RunFiles:
    """Return the files of a run below the storage root."""
    folder = f"{root}/training_runs/{file_name(model)}/{file_name(run)}"
    return RunFiles(root=folder, model=model, run=run, access=access)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint with authentic files."""

    name: CheckpointName
    workers: int
    parts: dict[str, bytes]
    """All files, decrypted, by name."""


def write_manifest(files: RunFiles, name: CheckpointName, *, workers: int, parts: Sequence[str]) -> None:
    """Mark a checkpoint as complete."""
    content = json.dumps({"workers": workers, "parts": sorted(parts)}).encode()
    files.write(f"checkpoints/{name.text()}/{MANIFEST}", content)


def read_checkpoint(files: RunFiles, name: CheckpointName) -> Checkpoint:
    """Read all files of a checkpoint.

    Raises:
        ArtifactTampered: A file is missing, cut off, altered, or of another checkpoint.
    """
    folder = f"checkpoints/{name.text()}"
    try:
        manifest = json.loads(files.read(f"{folder}/{MANIFEST}"))
        parts = {part: files.read(f"{folder}/{part}") for part in manifest["parts"]}
    except FileNotFoundError as error:
        raise ArtifactTampered(f"Checkpoint {name.text()} of run {files.run} is incomplete.") from error
    return Checkpoint(name=name, workers=manifest["workers"], parts=parts)


def find_checkpoint(files: RunFiles) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest complete checkpoint, and a warning for each newer one that was skipped."""
    warnings: list[str] = []
    for name in files.checkpoints():
        try:
            return read_checkpoint(files, name), warnings
        except ArtifactTampered as error:
            warnings.append(f"checkpoint {name.text()} was skipped: {error}")
    return None, warnings


def newest_complete(files: RunFiles) -> CheckpointName:
    """Return the name of the newest complete checkpoint of a run that has one. Its files are not read."""
    return next(name for name in files.checkpoints() if _is_complete(files, name))


def _is_complete(files: RunFiles, name: CheckpointName) -> bool:
    return files.exists(f"checkpoints/{name.text()}/{MANIFEST}")


def remove_old(files: RunFiles, *, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` complete ones, and the weights that no kept checkpoint refers to."""
    kept: list[CheckpointName] = []
    for name in files.checkpoints():
        if len(kept) < keep and _is_complete(files, name):
            kept.append(name)
        elif kept:
            files.remove(f"checkpoints/{name.text()}")
    used = {best_path(name.best_epoch) for name in kept}
    for epoch in files.names("best"):
        if f"best/{epoch}" not in used:
            files.remove(f"best/{epoch}")


def best_path(epoch: int) -> str:
    """Return the path of the weights of the best epoch."""
    return f"best/{epoch:06}"
