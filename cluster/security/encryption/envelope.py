"""Sealed files and values: AES-256-GCM under a data key that only a key store can unwrap.

A file is cut into chunks, each authenticated with the header and its number, the last one marked (the STREAM
construction: Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance", CRYPTO 2015). So no chunk can be altered, left out, repeated, moved or cut off, and no file can be
passed off as another artifact, version or part.

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
    """What a sealed file is; opening it under another identity fails."""

    artifact: str
    """`models/<name>`, say."""
    version: int
    part: str
    """The file's name within the artifact."""


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
    """Whether a file that begins so is a sealed one."""
    return data.startswith(MAGIC)


def seal(source: BinaryIO, target: BinaryIO, *, store: KeyStore, key: str, identity: Identity) -> None:
    """Encrypt a stream under a new data key; memory holds two chunks.

    Args:
        source, target: to read from and write to.
        store: wraps the data key.
        key: name of the key it is wrapped under.
        identity: bound into every chunk.
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
    cipher, bound = AESGCM(secret), hashlib.sha256(head).digest()
    chunk, index = source.read(CHUNK_BYTES), 0
    while True:
        following = source.read(CHUNK_BYTES)
        target.write(cipher.encrypt(_nonce(prefix, index, last=not following), chunk, bound))
        if not following:
            return
        chunk, index = following, index + 1


def opened(source: BinaryIO, *, store: KeyStore, key: str, identity: Identity) -> Iterator[bytes]:
    """The chunks of a sealed stream; what was given out before an error must not be used.

    Raises:
        ArtifactTampered: altered, cut, not what it should be, or sealed under another key.
        KeyNotFound, KeyRevoked, WrappedKeyInvalid, AccessDenied: as the key store says.
    """
    header, head = _read_header(source)
    if (header.artifact, header.version, header.part) != (identity.artifact, identity.version, identity.part):
        raise ArtifactTampered(
            f"A sealed file says it is {header.part} of {header.artifact} version {header.version}, expected "
            f"{identity.part} of {identity.artifact} version {identity.version}. Restore the right one."
        )
    if header.key != key:
        raise ArtifactTampered(
            f"{identity.part} of {identity.artifact} is sealed under key '{header.key}', not '{key}': "
            "somebody else made it."
        )
    cipher = AESGCM(store.unwrap(key, header.wrapped))
    bound, prefix = hashlib.sha256(head).digest(), bytes.fromhex(header.nonce_prefix)
    size = header.chunk_bytes + TAG_BYTES
    chunk, index = source.read(size), 0
    while True:
        following = source.read(size)
        try:
            yield cipher.decrypt(_nonce(prefix, index, last=not following), chunk, bound)
        except (InvalidTag, ValueError) as error:
            raise ArtifactTampered(
                f"{identity.part} of {identity.artifact} version {identity.version} was altered or cut off at chunk "
                f"{index}. Restore it from a backup or register the version anew."
            ) from error
        if not following:
            return
        chunk, index = following, index + 1


def seal_bytes(data: bytes, *, store: KeyStore, key: str, identity: Identity) -> bytes:
    """`seal` for what fits into memory."""
    target = io.BytesIO()
    seal(io.BytesIO(data), target, store=store, key=key, identity=identity)
    return target.getvalue()


def open_bytes(data: bytes, *, store: KeyStore, key: str, identity: Identity) -> bytes:
    """`opened` for what fits into memory; gives nothing unless all of it is whole."""
    return b"".join(opened(io.BytesIO(data), store=store, key=key, identity=identity))


def place_of(table: str, entity: bytes) -> bytes:
    """Where a value belongs, for `ValueCipher`: no two pairs give the same bytes.

    Args:
        table: what the value belongs to, `online/<view>` say.
        entity: which of its values it is, an entity's key as it is stored, say.
    """
    name = table.encode()
    return struct.pack(">I", len(name)) + name + entity


class ValueCipher:
    """Encrypts small values under one data key, each bound to its place, so that none can be moved to another.

    A random nonce of 96 bits allows 2^32 values for a data key (NIST SP 800-38D, 8.3).
    """

    def __init__(self, secret: bytes) -> None:
        self._cipher = AESGCM(secret)
        self.decrypt_raw = self._cipher.decrypt
        """Of nonce, ciphertext with tag, and place; raises `InvalidTag`. For loops in which a call more would show."""

    @classmethod
    def create(cls, store: KeyStore, key: str) -> tuple[ValueCipher, str]:
        """A cipher with a new data key, and that key's wrapped text to keep beside the values."""
        secret = AESGCM.generate_key(256)
        return cls(secret), store.wrap(key, secret)

    @classmethod
    def open(cls, store: KeyStore, key: str, wrapped: str) -> ValueCipher:
        """The cipher of a wrapped data key.

        Raises:
            KeyNotFound, KeyRevoked, WrappedKeyInvalid, AccessDenied: as the key store says.
        """
        return cls(store.unwrap(key, wrapped))

    def encrypt(self, value: bytes, place: bytes) -> bytes:
        """Nonce, ciphertext and tag."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, value, place)

    def decrypt(self, sealed: bytes, place: bytes) -> bytes:
        """The value that was encrypted for this place.

        Raises:
            ArtifactTampered: altered, cut, or of another place.
        """
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place)
        except (InvalidTag, ValueError) as error:
            raise ArtifactTampered(f"The value at {place!r} was altered or belongs elsewhere.") from error


def _nonce(prefix: bytes, index: int, *, last: bool) -> bytes:
    return prefix + struct.pack(">I?", index, last)


def _read_header(source: BinaryIO) -> tuple[_Header, bytes]:
    fixed = source.read(len(MAGIC) + 4)
    length = struct.unpack(">I", fixed[len(MAGIC) :])[0] if len(fixed) == len(MAGIC) + 4 else 0
    if fixed[: len(MAGIC)] != MAGIC or not 0 < length <= MAX_HEADER_BYTES:
        raise ArtifactTampered(
            "A file that should be sealed is not, or its beginning was altered or cut off."
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
        raise ArtifactTampered("The header of a sealed file was altered or cut off.") from error
    return header, fixed + encoded
