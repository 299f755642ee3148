"""Encryption of files and values with AES-256-GCM. The data key is wrapped by a key store.

A file is split into chunks. Each chunk is authenticated together with the header and the chunk's number, and the last
chunk is marked (the STREAM construction: Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and its
Nonce-Reuse Misuse-Resistance", CRYPTO 2015). So no chunk can be altered, left out, repeated, moved or cut off. A file
cannot replace a file of another artifact, version or part.

    magic (8) | header length (4) | header, JSON | chunk 0 | chunk 1 | …       each chunk: ciphertext, tag (16)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cluster.errors import ArtifactTampered
from cluster.security.keys.store import KeyStore

MAGIC = b"FALAJ\x00\x00\x01"
CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 16
TAG_BYTES, NONCE_BYTES, PREFIX_BYTES = 16, 12, 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Identity of a sealed file. Opening the file under another identity fails."""

    artifact: str
    """For example `models/<name>`."""
    version: int
    part: str
    """Name of the file within the artifact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    key: str
    wrapped: str
    artifact: str
    version: int
    part: str
    chunk_bytes: int
    nonce_prefix: str


def is_sealed(data: bytes) -> bool:
    """Return whether a file that begins with these bytes is sealed."""
    return data.startswith(MAGIC)


def seal(source: BinaryIO, target: BinaryIO, *, store: KeyStore, key: str, identity: Identity) -> None:
    """Encrypt `source` under a new data key, and write the result to `target`. Two chunks are in memory at a time.

    Args:
        source: file object to read from.
        target: file object to write to.
        store: key store that wraps the data key.
        key: name of the key that wraps the data key.
        identity: identity of the file; every chunk is bound to it.
    """
    secret, prefix = AESGCM.generate_key(256), os.urandom(PREFIX_BYTES)
    header = _Header(
        key=key,
        wrapped=store.wrap(key, secret),
        **asdict(identity),
        chunk_bytes=CHUNK_BYTES,
        nonce_prefix=prefix.hex(),
    )
    encoded = json.dumps(asdict(header), sort_keys=True).encode()
    head = MAGIC + struct.pack(">I", len(encoded)) + encoded
    target.write(head)
    cipher, aad = AESGCM(secret), hashlib.sha256(head).digest()
    chunk, index = source.read(CHUNK_BYTES), 0
    while True:
        next_chunk = source.read(CHUNK_BYTES)
        target.write(cipher.encrypt(_nonce(prefix, index, last=not next_chunk), chunk, aad))
        if not next_chunk:
            return
        chunk, index = next_chunk, index + 1


def open_chunks(source: BinaryIO, *, store: KeyStore, key: str, identity: Identity) -> Iterator[bytes]:
    """Yield the decrypted chunks of a sealed file. After an error, the caller must discard the chunks that it got.

    Raises:
        ArtifactTampered: the file is altered, cut off, of another identity, or sealed under another key.
        KeyNotFound, KeyRevoked, WrappedKeyInvalid, AccessDenied: errors of the key store.
    """
    header, head = _read_header(source)
    if (header.artifact, header.version, header.part) != (identity.artifact, identity.version, identity.part):
        raise ArtifactTampered(
            f"A sealed file is {header.part} of {header.artifact} version {header.version}, expected "
            f"{identity.part} of {identity.artifact} version {identity.version}. Restore the right file."
        )
    if header.key != key:
        raise ArtifactTampered(
            f"{identity.part} of {identity.artifact} is sealed under key '{header.key}', not '{key}': "
            "it was written for another key. Restore the right file."
        )
    cipher = AESGCM(store.unwrap(key, header.wrapped))
    aad, prefix = hashlib.sha256(head).digest(), bytes.fromhex(header.nonce_prefix)
    size = header.chunk_bytes + TAG_BYTES
    chunk, index = source.read(size), 0
    while True:
        next_chunk = source.read(size)
        try:
            yield cipher.decrypt(_nonce(prefix, index, last=not next_chunk), chunk, aad)
        except (InvalidTag, ValueError) as error:
            raise ArtifactTampered(
                f"{identity.part} of {identity.artifact} version {identity.version} was altered or cut off at chunk "
                f"{index}. Restore it from a backup or register the version again."
            ) from error
        if not next_chunk:
            return
        chunk, index = next_chunk, index + 1


def seal_bytes(data: bytes, *, store: KeyStore, key: str, identity: Identity) -> bytes:
    """Encrypt bytes that fit into memory, see `seal`."""
    target = io.BytesIO()
    seal(io.BytesIO(data), target, store=store, key=key, identity=identity)
    return target.getvalue()


def open_bytes(data: bytes, *, store: KeyStore, key: str, identity: Identity) -> bytes:
    """Decrypt bytes that fit into memory. If a chunk is not authentic, raise an error, see `open_chunks`."""
    return b"".join(open_chunks(io.BytesIO(data), store=store, key=key, identity=identity))


def value_aad(table: str, entity: bytes) -> bytes:
    """Return the AAD of a value for `ValueCipher`. No two pairs of arguments give the same bytes.

    Args:
        table: owner of the value, such as `online/<view>`.
        entity: identifies the value among the owner's values, such as an entity's stored key.
    """
    name = table.encode()
    return struct.pack(">I", len(name)) + name + entity


class ValueCipher:
    """Encrypts small values under one data key. Each value is bound to its AAD, so it cannot be moved to another place.

    A random nonce of 96 bits allows 2^32 values for each data key (NIST SP 800-38D, 8.3).
    """

    def __init__(self, secret: bytes) -> None:
        self._cipher = AESGCM(secret)
        self.decrypt_raw = self._cipher.decrypt
        """Decrypts (nonce, ciphertext with tag, AAD) or raises `InvalidTag`. It saves one call per value in loops."""

    @classmethod
    def create(cls, store: KeyStore, key: str) -> tuple[ValueCipher, str]:
        """Return a cipher with a new data key, and the wrapped data key, to be stored with the values."""
        secret = AESGCM.generate_key(256)
        return cls(secret), store.wrap(key, secret)

    @classmethod
    def open(cls, store: KeyStore, key: str, wrapped: str) -> ValueCipher:
        """Return the cipher of a wrapped data key.

        Raises:
            KeyNotFound, KeyRevoked, WrappedKeyInvalid, AccessDenied: errors of the key store.
        """
        return cls(store.unwrap(key, wrapped))

    def encrypt(self, value: bytes, aad: bytes) -> bytes:
        """Return nonce, ciphertext and tag."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, value, aad)

    def decrypt(self, sealed: bytes, aad: bytes) -> bytes:
        """Return the value that was encrypted with this AAD.

        Raises:
            ArtifactTampered: the value is altered, cut off, or bound to another AAD.
        """
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
        except (InvalidTag, ValueError) as error:
            raise ArtifactTampered(
                f"The value at {aad!r} was altered or belongs to another place."
            ) from error


def _nonce(prefix: bytes, index: int, *, last: bool) -> bytes:
    return prefix + struct.pack(">I?", index, last)


def _read_header(source: BinaryIO) -> tuple[_Header, bytes]:
    fixed = source.read(len(MAGIC) + 4)
    length = struct.unpack(">I", fixed[len(MAGIC) :])[0] if len(fixed) == len(MAGIC) + 4 else 0
    if fixed[: len(MAGIC)] != MAGIC or not 0 < length <= MAX_HEADER_BYTES:
        raise ArtifactTampered(
            "A file is not sealed, or its beginning was altered or cut off. Restore it from a backup."
        )
    encoded = source.read(length)
    try:
        header = _Header(**json.loads(encoded))
        if (
            type(header.chunk_bytes) is not int
            or not 0 < header.chunk_bytes <= CHUNK_BYTES
            or len(bytes.fromhex(header.nonce_prefix)) != PREFIX_BYTES
        ):
            raise ValueError("out of range")
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactTampered(
            "The header of a sealed file was altered or cut off. Restore the file from a backup."
        ) from error
    return header, fixed + encoded
