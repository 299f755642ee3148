"""Files of a model version: the allowed formats, and the manifest that proves that the files are unchanged.

Only formats that contain nothing but numbers and text are allowed. Pickle is not allowed: a pickle file can run code,
and scanners miss some of it. Files are stored encrypted with the model's key. `manifest.json` lists the SHA-256 of each
stored file. The ledger contains the SHA-256 of the manifest, so the files can be verified without a key.
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
    """Return the file names of a model folder, sorted.

    Raises:
        RefusedError: The folder is empty, has a subfolder, or has a file in a format that is not allowed.
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
    """Return the key that encrypts all versions of a model.

    Its class is not public, because a model can reveal rows of its training set.
    """
    return KeyInfo(name=f"models/{name}", column_class="internal")


def seal_file(data: bytes, *, name: str, version: int, part: str, store: KeyStore) -> bytes:
    """Encrypt one model file for storage."""
    identity = Identity(artifact=f"models/{name}", version=version, part=part)
    return seal_bytes(data, store=store, key=model_key(name).name, identity=identity)


def open_file(data: bytes, *, name: str, version: int, part: str, store: KeyStore) -> bytes:
    """Decrypt one stored model file.

    Raises:
        ArtifactTampered: The ciphertext belongs to another file.
        KeyNotFound, KeyRevoked, AccessDenied: The key store refuses the key.
    """
    identity = Identity(artifact=f"models/{name}", version=version, part=part)
    return open_bytes(data, store=store, key=model_key(name).name, identity=identity)


def manifest_bytes(files: dict[str, str]) -> bytes:
    """Return the manifest as the bytes that are stored and hashed."""
    return canonical({"files": files})


def verify_files(uri: str, manifest_hash: str) -> dict[str, str]:
    """Verify that a version's folder contains exactly the registered files, and return the SHA-256 of each file name.

    Raises:
        ArtifactTampered: A file differs, is missing or was added. The message names the first such file.
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


def _tampered(uri: str, name: str, problem: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"Model file '{name}' of {uri} {problem}. Restore the version from a backup, or train it again."
    )
