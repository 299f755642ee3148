"""From a model version's folder to a `Model`; nothing is parsed before its hash has been checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cluster.artifact import verify_files
from cluster.errors import ArtifactTampered, RefusedError
from cluster.runtime.model import Engine, Model
from cluster.runtime.signature import LIGHTGBM_FILE, ONNX_FILE, SIGNATURE_FILE, parse_signature
from cluster.storage import read_bytes

_NEEDED = (SIGNATURE_FILE, LIGHTGBM_FILE, ONNX_FILE)


def load_model(uri: str, manifest_hash: str, *, num_threads: int = 1) -> Model:
    """Load a registered version.

    Args:
        uri: the version's folder.
        manifest_hash: SHA-256 of its manifest as the ledger has it.
        num_threads: CPU threads one prediction may use.

    Raises:
        ArtifactTampered: a file is not the one that was registered.
        RefusedError: the files are as registered, but make no model.
    """
    files = verify_files(uri, manifest_hash)
    return _load(
        {name: _read(uri, name, digest) for name, digest in files.items() if name in _NEEDED}, num_threads
    )


def open_model(folder: Path, *, num_threads: int = 1) -> Model:
    """Load a folder of model files that is not registered yet, as training has just written it.

    Raises:
        RefusedError: the files make no model.
    """
    return _load(
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name in _NEEDED}, num_threads
    )


def _read(uri: str, name: str, digest: str) -> bytes:
    data = read_bytes(f"{uri}/{name}")
    # Checked on the very bytes that are parsed: the file may have changed since the folder was verified.
    if hashlib.sha256(data).hexdigest() != digest:
        raise ArtifactTampered(f"Model file '{name}' of {uri} changed while it was being loaded.")
    return data


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
