"""Signed checkpoints. With a checkpoint that is stored elsewhere, an auditor can detect removed or rewritten events.

The signature is Ed25519 over `<seq>:<hash>`. The private key is a file in the keys folder. The public key is a file
in the same folder; auditors get that file.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cluster.errors import ConfigError, LedgerCorrupt
from cluster.ledger.chain import Entry
from cluster.ledger.events import CheckpointSigned

PRIVATE_NAME = "ledger.pem"
PUBLIC_NAME = "ledger.pub.pem"


class Signer:
    """Signs checkpoints with an Ed25519 key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key()
        self.key_id = key_id(self.public_key)

    def sign(self, message: bytes) -> str:
        """Return the signature in base64."""
        return base64.b64encode(self._key.sign(message)).decode()


def key_id(key: Ed25519PublicKey) -> str:
    """Return the first 16 hex digits of the SHA-256 of the raw public key."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def ensure_signer(keys: Path) -> Signer:
    """Return the signer of a keys folder. If the folder has no key, create a key file with mode 0600.

    Raises:
        ConfigError: The key file does not contain an Ed25519 private key.
    """
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (keys / PRIVATE_NAME).exists():
        _create_keys(keys)
    return _read_signer(keys / PRIVATE_NAME)


def load_signer(keys: Path) -> Signer | None:
    """Return the signer of a keys folder, or None if no key exists yet.

    Raises:
        ConfigError: The key file does not contain an Ed25519 private key.
    """
    path = keys / PRIVATE_NAME
    return _read_signer(path) if path.exists() else None


def _create_keys(keys: Path) -> None:
    key = Ed25519PrivateKey.generate()
    public_bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (keys / PUBLIC_NAME).write_bytes(public_bytes)
    private_bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor = os.open(keys / PRIVATE_NAME, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private_bytes)


def _read_signer(path: Path) -> Signer:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
    ) as error:  # the key is damaged, has a password, or is of another type
        raise _no_private_key(path) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_private_key(path)
    return Signer(key)


def _no_private_key(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} holds no Ed25519 private key. Restore the ledger's signing key from a backup."
    )


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Load an Ed25519 public key from a PEM file.

    Raises:
        ConfigError: The file is not readable or does not contain an Ed25519 public key.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a public key in PEM: {error}.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} holds no Ed25519 public key.")
    return key


def checkpoint(signer: Signer, entry: Entry) -> CheckpointSigned:
    """Return the signed checkpoint for the chain up to and including an entry."""
    return CheckpointSigned(
        upto_seq=entry.seq,
        upto_hash=entry.hash,
        key_id=signer.key_id,
        signature=signer.sign(_message(entry.seq, entry.hash)),
    )


def verify_signatures(entries: Iterable[Entry], key: Ed25519PublicKey) -> Iterator[Entry]:
    """Yield the entries, and verify each checkpoint: `key` signed it, and the entry that it names has the same hash.

    Raises:
        LedgerCorrupt: A checkpoint is invalid. The error has the checkpoint's `seq`.
    """
    hashes: dict[int, str] = {}
    for entry in entries:
        event = entry.event() if entry.type == CheckpointSigned.__name__ else None
        if isinstance(event, CheckpointSigned):
            _verify_checkpoint(event, seq=entry.seq, actual_hash=hashes.get(event.upto_seq), key=key)
            hashes.clear()
        hashes[entry.seq] = entry.hash
        yield entry


def _verify_checkpoint(
    event: CheckpointSigned, *, seq: int, actual_hash: str | None, key: Ed25519PublicKey
) -> None:
    if actual_hash != event.upto_hash:
        raise LedgerCorrupt(
            f"Checkpoint {seq} does not match event {event.upto_seq}: the hashes differ.", seq=seq
        )
    try:
        key.verify(base64.b64decode(event.signature), _message(event.upto_seq, event.upto_hash))
    except (InvalidSignature, ValueError) as error:
        raise LedgerCorrupt(f"Checkpoint {seq} is not signed by the given key.", seq=seq) from error


def _message(seq: int, entry_hash: str) -> bytes:
    return f"{seq}:{entry_hash}".encode()
