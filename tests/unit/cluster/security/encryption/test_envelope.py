"""Sealed files and values: intact ones open, all others are refused."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ArtifactTampered
from cluster.security.encryption import envelope
from cluster.security.encryption.envelope import (
    CHUNK_BYTES,
    Identity,
    ValueCipher,
    is_sealed,
    open_bytes,
    seal_bytes,
    value_aad,
)
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo, KeyRevoked, WrappedKeyInvalid

KEY = "models/m"
MODEL = Identity(artifact="models/m", version=1, part="model.onnx")
SMALL_CHUNK = 64
LONG = bytes(range(256)) * 2


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    keyring = Keyring.create(tmp_path_factory.mktemp("keys") / "keyring.json", b"k" * 32)
    for name in (KEY, "models/other"):
        keyring.ensure(KeyInfo(name=name))
    return keyring


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small chunks, so that a short file has many."""
    monkeypatch.setattr(envelope, "CHUNK_BYTES", SMALL_CHUNK)


def reseal(keyring: Keyring, data: bytes, identity: Identity = MODEL) -> bytes:
    return seal_bytes(data, store=keyring, key=KEY, identity=identity)


def reopen(keyring: Keyring, data: bytes, *, key: str = KEY, identity: Identity = MODEL) -> bytes:
    return open_bytes(data, store=keyring, key=key, identity=identity)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_sealed_file_opens_unchanged(keyring: Keyring, size: int) -> None:
    """Holds at every chunk boundary. The sealed file does not contain the plaintext."""
    data = b"canary" * (size // 6) + b"x" * (size % 6)
    sealed = reseal(keyring, data)
    assert is_sealed(sealed)
    assert not is_sealed(data)
    assert b"canary" not in sealed
    assert reopen(keyring, sealed) == data


def test_same_content_gives_different_sealed_files(keyring: Keyring) -> None:
    """Each file has its own data key."""
    assert reseal(keyring, LONG) != reseal(keyring, LONG)


def test_flipped_bit_is_refused(keyring: Keyring) -> None:
    """The error names what was altered: the file, or the wrapped key in its header."""
    sealed = reseal(keyring, LONG)
    for position in range(len(sealed)):
        altered = bytearray(sealed)
        altered[position] ^= 1 << position % 8
        with pytest.raises((ArtifactTampered, WrappedKeyInvalid)):
            reopen(keyring, bytes(altered))


def test_truncated_file_is_refused(keyring: Keyring) -> None:
    """Holds for every length."""
    sealed = reseal(keyring, LONG)
    for length in range(len(sealed)):
        with pytest.raises(ArtifactTampered):
            reopen(keyring, sealed[:length])


HEADER = {"key": KEY, "wrapped": "x", "artifact": "models/m", "version": 1, "part": "model.onnx"}
HEADER |= {"chunk_bytes": 64, "nonce_prefix": "00" * 7}
CHANGES: list[dict[str, object]] = [{"chunk_bytes": value} for value in (1.5, True, 2**40, "64")]
CHANGES += [{"nonce_prefix": 7}, {"nonce_prefix": "00"}, {"more": 1}]


@pytest.mark.parametrize(
    "header",
    [b"[" * 60000, b"[]", b"\xff", *(json.dumps(HEADER | change).encode() for change in CHANGES)],
    ids=lambda header: header[-40:].decode(errors="replace"),
)
def test_invalid_header_is_refused(keyring: Keyring, header: bytes) -> None:
    """It is refused before a key is requested."""
    forged = envelope.MAGIC + struct.pack(">I", len(header)) + header + bytes(100)
    with pytest.raises(ArtifactTampered, match="header"):
        reopen(keyring, forged)


@pytest.mark.parametrize(
    "change",
    [
        lambda chunks: [chunks[1], chunks[0], *chunks[2:]],
        lambda chunks: [chunks[0], *chunks],
        lambda chunks: chunks[1:],
        lambda chunks: chunks[:-1],
        lambda chunks: [*chunks, b"more"],
    ],
    ids=["swapped", "repeated", "without the first", "without the last", "with more"],
)
def test_moved_or_missing_chunk_is_refused(
    small_chunks: None, keyring: Keyring, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    """No chunk can be moved, repeated, left out or added, also at the end of the file."""
    size = SMALL_CHUNK + envelope.TAG_BYTES
    sealed = reseal(keyring, LONG)
    length = len(LONG) // SMALL_CHUNK * size
    head, body = sealed[:-length], sealed[-length:]
    chunks = [body[at : at + size] for at in range(0, length, size)]
    assert reopen(keyring, head + b"".join(chunks)) == LONG
    with pytest.raises(ArtifactTampered, match="chunk"):
        reopen(keyring, head + b"".join(change(chunks)))


@pytest.mark.parametrize(
    "other",
    [
        Identity(artifact="models/x", version=1, part="model.onnx"),
        Identity(artifact="models/m", version=2, part="model.onnx"),
        Identity(artifact="models/m", version=1, part="model.json"),
    ],
    ids=str,
)
def test_file_with_another_identity_is_refused(keyring: Keyring, other: Identity) -> None:
    """Although both files have the same key."""
    with pytest.raises(ArtifactTampered, match="expected"):
        reopen(keyring, reseal(keyring, LONG), identity=other)


def test_file_under_another_key_is_refused(keyring: Keyring) -> None:
    """A principal with another key cannot forge a model of this name."""
    forged = seal_bytes(LONG, store=keyring, key="models/other", identity=MODEL)
    with pytest.raises(ArtifactTampered, match="models/other"):
        reopen(keyring, forged)


def test_rotated_key_opens_old_files_and_revoked_key_opens_none(tmp_path: Path) -> None:
    """The store keeps old versions until the key is revoked."""
    keyring = Keyring.create(tmp_path / "keyring.json", b"k" * 32)
    keyring.ensure(KeyInfo(name=KEY))
    sealed = reseal(keyring, LONG)
    keyring.rotate(KEY)
    assert reopen(keyring, sealed) == LONG
    keyring.revoke(KEY)
    with pytest.raises(KeyRevoked):
        reopen(keyring, sealed)


def test_stream_is_read_in_chunks(small_chunks: None, keyring: Keyring) -> None:
    """No call reads more than one chunk, for any length of the file."""
    sizes: list[int] = []

    class Source(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            sizes.append(size or 0)
            return super().read(size)

    target = io.BytesIO()
    envelope.seal(Source(LONG * 20), target, store=keyring, key=KEY, identity=MODEL)
    assert set(sizes) == {SMALL_CHUNK}
    assert reopen(keyring, target.getvalue()) == LONG * 20


@given(value=st.binary(max_size=300), aad=st.binary(max_size=40))
def test_value_opens_only_with_its_aad(keyring: Keyring, value: bytes, aad: bytes) -> None:
    """Holds also after the data key was unwrapped again."""
    cipher, wrapped = ValueCipher.create(keyring, KEY)
    sealed = cipher.encrypt(value, aad)
    reopened = ValueCipher.open(keyring, KEY, wrapped)
    assert reopened.decrypt(sealed, aad) == value
    with pytest.raises(ArtifactTampered):
        reopened.decrypt(sealed, aad + b"x")
    with pytest.raises(ArtifactTampered):
        reopened.decrypt(sealed[:-1], aad)


@given(name=st.text("ab\0", max_size=4), key=st.text("ab\0", max_size=4), split=st.integers(0, 4))
def test_different_values_have_different_aads(name: str, key: str, split: int) -> None:
    """Holds for every end of a table name and start of a key."""
    joined = name + key
    table, entity = joined[:split], joined[split:].encode()
    same = (table, entity) == (name, key.encode())
    assert (value_aad(name, key.encode()) == value_aad(table, entity)) == same
