"""A model version's files: the formats that are allowed, and the manifest that proves them unchanged.

Pickle can run code and scanners miss it, so the only formats are those that hold numbers and text. Files are stored
sealed under the model's key. `manifest.json` lists the SHA-256 of each as it is stored, and the manifest's own SHA-256
stands in the ledger: what was registered can be proved without any key.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cluster.errors import ArtifactTampered, RefusedError
from cluster.ledger.chain import canonical
from cluster.security.encryption.envelope import Identity, open_bytes, seal_bytes
from cluster.security.keys.store import KeyInfo, KeyStore
from cluster.storage import exists, list_files, read_bytes, sha256

MANIFEST = "manifest.json"
ALLOWED_SUFFIXES = (".safetensors", ".onnx", ".txt", ".json")


def allowed_files(folder: Path) -> list[str]:
    """The names of a folder's files, sorted.

    Raises:
        RefusedError: a subfolder, a file in a format that is not allowed, or no file at all.
    """
    names = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in ALLOWED_SUFFIXES:
            raise RefusedError(
                f"Model file '{path.name}' has no allowed format; use {', '.join(ALLOWED_SUFFIXES)} in one flat folder."
            )
        if path.name != MANIFEST:
            names.append(path.name)
    if not names:
        raise RefusedError(f"Model folder {folder} is empty: the family wrote no files.")
    return names


def model_key(name: str) -> KeyInfo:
    """The key that all versions of a model are sealed under; a model may show its rows, so it is not public."""
    return KeyInfo(name=f"models/{name}", column_class="internal")


def seal_file(data: bytes, *, name: str, version: int, part: str, store: KeyStore) -> bytes:
    """A model file as it is stored."""
    identity = Identity(artifact=f"models/{name}", version=version, part=part)
    return seal_bytes(data, store=store, key=model_key(name).name, identity=identity)


def open_file(data: bytes, *, name: str, version: int, part: str, store: KeyStore) -> bytes:
    """A stored model file's content.

    Raises:
        ArtifactTampered: it is another file than the one it should be.
        KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
    """
    identity = Identity(artifact=f"models/{name}", version=version, part=part)
    return open_bytes(data, store=store, key=model_key(name).name, identity=identity)


def manifest_bytes(files: dict[str, str]) -> bytes:
    """The manifest as it is stored and hashed."""
    return canonical({"files": files})


def verify_files(uri: str, manifest_hash: str) -> dict[str, str]:
    """Prove that a version's folder holds just what was registered; gives file name to SHA-256.

    Raises:
        ArtifactTampered: naming the first file that differs, is missing or was added.
    """
    manifest_uri = f"{uri}/{MANIFEST}"
    if not exists(manifest_uri):
        raise ArtifactTampered(
            f"{manifest_uri} is missing. Restore the version from a backup, or train it again."
        )
    data = read_bytes(manifest_uri)
    if hashlib.sha256(data).hexdigest() != manifest_hash:
        raise _tampered(uri, MANIFEST, "does not have the hash that the ledger holds")
    files: dict[str, str] = json.loads(data)["files"]
    present = {name.rsplit("/", 1)[-1] for name in list_files(uri)} - {MANIFEST}
    for name in sorted(present | files.keys()):
        if name not in present:
            raise _tampered(uri, name, "is missing")
        if name not in files:
            raise _tampered(uri, name, "was not registered")
        if sha256(f"{uri}/{name}") != files[name]:
            raise _tampered(uri, name, "does not have its registered hash")
    return files


def _tampered(uri: str, name: str, what: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"Model file '{name}' of {uri} {what}. Restore the version from a backup, or train it again."
    )
