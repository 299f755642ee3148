"""Load a model version's folder as a `Model`. A registered file is parsed only after its hash was verified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

from cluster.artifact import open_file, verify_files
from cluster.errors import ArtifactTampered, RefusedError
from cluster.registry import ModelVersion
from cluster.runtime.device_choice import CPU, LOG, Hardware, Runner, choose_runner
from cluster.runtime.model import Engine, Model
from cluster.runtime.signature import (
    LANGUAGE_MODEL,
    LIGHTGBM_FILE,
    NETWORK_FILE,
    ONNX_FILE,
    SIGNATURE_FILE,
    WEIGHTS_FILE,
    ModelSignature,
    parse_signature,
)
from cluster.security.keys.store import KeyStore
from cluster.storage import read_bytes

ReadFile = Callable[[str], bytes]
"""Reads a file of the model's folder by name."""
ONE_CPU = Hardware()


def require_rows(version: ModelVersion) -> None:
    """Require that a version predicts from a table's rows.

    Raises:
        RefusedError: The version is a language model.
    """
    if version.task == LANGUAGE_MODEL:
        raise RefusedError(
            f"{version.name} version {version.version} is a language model (family {version.family}). Such versions "
            "are only trained and registered: they cannot be deployed, and no command scores rows with them."
        )


def load_model(version: ModelVersion, store: KeyStore, *, hardware: Hardware = ONE_CPU) -> Model:
    """Load a registered version.

    Args:
        version: Version from the registry.
        store: Key store with the model's key.
        hardware: Hardware that the model may use.

    Raises:
        ArtifactTampered: A file differs from the registered one.
        AccessDenied, KeyRevoked: The key store refuses the key.
        RefusedError: The files are the registered ones, but not a valid model, or a language model.
    """
    require_rows(version)
    verify_files(version.uri, version.manifest_hash)
    return _load(version.files, lambda name: read_file(version, name, store), hardware)


def read_file(version: ModelVersion, name: str, store: KeyStore) -> bytes:
    """Read, verify and decrypt one file of a version.

    Raises:
        ArtifactTampered: The file differs from the registered one.
        AccessDenied, KeyRevoked: The key store refuses the key.
    """
    data = read_bytes(f"{version.uri}/{name}")
    # The hash of exactly these bytes is verified: the file may have changed since the folder was verified.
    if hashlib.sha256(data).hexdigest() != version.files[name]:
        raise ArtifactTampered(
            f"Model file '{name}' of {version.uri} differs from the registered one. Restore the version from a "
            "backup, or train it again."
        )
    return open_file(data, name=version.name, version=version.version, part=name, store=store)


def load_signature(version: ModelVersion, store: KeyStore) -> ModelSignature:
    """Load only the signature of a registered version.

    Raises:
        ArtifactTampered, AccessDenied, KeyRevoked: See `read_file`.
        RefusedError: The file is not a signature, or the version is a language model.
    """
    require_rows(version)
    return parse_signature(read_file(version, SIGNATURE_FILE, store))


def open_model(folder: Path, *, hardware: Hardware = ONE_CPU) -> Model:
    """Load a folder of model files that is not registered yet, for example after training.

    Raises:
        RefusedError: The files are not a valid model.
    """
    names = [path.name for path in folder.iterdir()]
    return _load(names, lambda name: (folder / name).read_bytes(), hardware)


def _load(names: Collection[str], read: ReadFile, hardware: Hardware) -> Model:
    if SIGNATURE_FILE not in names:
        raise RefusedError(f"The model folder has no {SIGNATURE_FILE}. Train the version again.")
    signature = parse_signature(read(SIGNATURE_FILE))
    return Model(signature, _engine(signature, names, read, hardware))


def _engine(signature: ModelSignature, names: Collection[str], read: ReadFile, hardware: Hardware) -> Engine:
    # Engines are imported here: LightGBM and torch take seconds to import, and a replica needs only one engine.
    runner = choose_runner(names, signature.precision, hardware)
    if hardware.device != CPU and runner is Runner.lightgbm:
        LOG.warning("a GPU is reserved for a model that runs on the CPU: trees use no GPU")
    match runner:
        case Runner.lightgbm:
            from cluster.runtime.lightgbm_engine import LightGBMEngine

            text = read(LIGHTGBM_FILE).decode(errors="replace")
            return LightGBMEngine(text, num_threads=hardware.num_threads)
        case Runner.onnx:
            from cluster.runtime.onnx_engine import OnnxEngine

            return OnnxEngine(read(ONNX_FILE), precision=signature.precision, hardware=hardware)
        case Runner.torch:
            from cluster.runtime.torch_engine import TorchEngine

            return TorchEngine(read(NETWORK_FILE), read(WEIGHTS_FILE), hardware=hardware)
