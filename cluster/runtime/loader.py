"""From a model version's folder to a `Model`; nothing is parsed before its hash has been checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cluster.artifact import open_file, verify_files
from cluster.errors import ArtifactTampered, RefusedError
from cluster.registry import ModelVersion
from cluster.runtime.model import Engine, Model
from cluster.runtime.signature import LIGHTGBM_FILE, ONNX_FILE, SIGNATURE_FILE, parse_signature
from cluster.security.keys.store import KeyStore
from cluster.storage import read_bytes

_NEEDED = (SIGNATURE_FILE, LIGHTGBM_FILE, ONNX_FILE)


def load_model(version: ModelVersion, store: KeyStore, *, num_threads: int = 1) -> Model:
    """Load a registered version.

    Args:
        version: as the registry has it.
        store: has the model's key.
        num_threads: CPU threads one prediction may use.

    Raises:
        ArtifactTampered: a file is not the one that was registered.
        AccessDenied, KeyRevoked: as the key store says.
        RefusedError: the files are as registered, but make no model.
    """
    verify_files(version.uri, version.manifest_hash)
    needed = [name for name in version.files if name in _NEEDED]
    return _load({name: read_file(version, name, store) for name in needed}, num_threads)


def read_file(version: ModelVersion, name: str, store: KeyStore) -> bytes:
    """The content of one of a version's files, proved to be the one that was registered.

    Raises:
        ArtifactTampered: it is not.
        AccessDenied, KeyRevoked: as the key store says.
    """
    data = read_bytes(f"{version.uri}/{name}")
    # Checked on the very bytes that are opened: the file may have changed since the folder was verified.
    if hashlib.sha256(data).hexdigest() != version.files[name]:
        raise ArtifactTampered(f"Model file '{name}' of {version.uri} is not the one that was registered.")
    return open_file(data, name=version.name, version=version.version, part=name, store=store)


def open_model(folder: Path, *, num_threads: int = 1) -> Model:
    """Load a folder of model files that is not registered yet, as training has just written it.

    Raises:
        RefusedError: the files make no model.
    """
    return _load(
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name in _NEEDED}, num_threads
    )


def _load(files: dict[str, bytes], num_threads: int) -> Model:
    if SIGNATURE_FILE not in files:
        raise RefusedError(f"The model folder has no {SIGNATURE_FILE}. Train the version again.")
    return Model(parse_signature(files[SIGNATURE_FILE]), _engine(files, num_threads))


def _engine(files: dict[str, bytes], num_threads: int) -> Engine:
    # Imported here: LightGBM takes two seconds to import, and a replica needs only one of the engines.
    match ONNX_FILE in files, LIGHTGBM_FILE in files:
        case True, False:
            from cluster.runtime.onnx_engine import OnnxEngine

            return OnnxEngine(files[ONNX_FILE], num_threads=num_threads)
        case False, True:
            from cluster.runtime.lightgbm_engine import LightGBMEngine

            return LightGBMEngine(files[LIGHTGBM_FILE].decode(errors="replace"), num_threads=num_threads)
        case _:
            raise RefusedError(
                f"A model folder needs either {ONNX_FILE} or {LIGHTGBM_FILE}, not both or none."
            )
