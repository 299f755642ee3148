"""Sealed files and values: whole they open, in any other state they are refused."""

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
    place_of,
    seal_bytes,
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
    """So that a short file has many chunks."""
    monkeypatch.setattr(envelope, "CHUNK_BYTES", SMALL_CHUNK)


def reseal(keyring: Keyring, data: bytes, identity: Identity = MODEL) -> bytes:
    return seal_bytes(data, store=keyring, key=KEY, identity=identity)


def reopen(keyring: Keyring, data: bytes, *, key: str = KEY, identity: Identity = MODEL) -> bytes:
    return open_bytes(data, store=keyring, key=key, identity=identity)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_what_was_sealed_is_opened(keyring: Keyring, size: int) -> None:
    """At every border of a chunk, and nothing of it shows in between."""
    data = b"canary" * (size // 6) + b"x" * (size % 6)
    sealed = reseal(keyring, data)
    assert is_sealed(sealed)
    assert not is_sealed(data)
    assert b"canary" not in sealed
    assert reopen(keyring, sealed) == data


def test_the_same_content_is_never_sealed_the_same(keyring: Keyring) -> None:
    """Each file has a data key of its own."""
    assert reseal(keyring, LONG) != reseal(keyring, LONG)


def test_a_flipped_bit_is_refused(keyring: Keyring) -> None:
    """Every single one, by what was altered: the file, or the wrapped key in its header."""
    sealed = reseal(keyring, LONG)
    for place in range(len(sealed)):
        altered = bytearray(sealed)
        altered[place] ^= 1 << place % 8
        with pytest.raises((ArtifactTampered, WrappedKeyInvalid)):
            reopen(keyring, bytes(altered))


def test_a_truncated_file_is_refused(keyring: Keyring) -> None:
    """Whatever is left of it."""
    sealed = reseal(keyring, LONG)
    for kept in range(len(sealed)):
        with pytest.raises(ArtifactTampered):
            reopen(keyring, sealed[:kept])


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 60000,
        b"[]",
        b"\xff",
        *(
            json.dumps(
                {
                    "key": KEY,
                    "wrapped": "x",
                    "artifact": "models/m",
                    "version": 1,
                    "part": "model.onnx",
                    "chunk_bytes": 64,
                    "nonce_prefix": "00" * 7,
                }
                | change
            ).encode()
            for change in (
                {"chunk_bytes": 1.5},
                {"chunk_bytes": True},
                {"chunk_bytes": 2**40},
                {"chunk_bytes": "64"},
                {"nonce_prefix": 7},
                {"nonce_prefix": "00"},
                {"more": 1},
            )
        ),
    ],
    ids=lambda header: header[-40:].decode(errors="replace"),
)
def test_a_made_up_header_is_refused(keyring: Keyring, header: bytes) -> None:
    """Before any key is asked for."""
    made_up = envelope.MAGIC + struct.pack(">I", len(header)) + header + bytes(100)
    with pytest.raises(ArtifactTampered, match="header"):
        reopen(keyring, made_up)


def swapped(chunks: list[bytes]) -> list[bytes]:
    return [chunks[1], chunks[0], *chunks[2:]]


def repeated(chunks: list[bytes]) -> list[bytes]:
    return [chunks[0], *chunks]


def without_first(chunks: list[bytes]) -> list[bytes]:
    return chunks[1:]


def without_last(chunks: list[bytes]) -> list[bytes]:
    return chunks[:-1]


def with_more(chunks: list[bytes]) -> list[bytes]:
    return [*chunks, b"more"]


@pytest.mark.parametrize("change", [swapped, repeated, without_first, without_last, with_more])
def test_chunks_keep_their_places(
    small_chunks: None, keyring: Keyring, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    """None is moved, repeated, left out or added, the last at a chunk's border neither."""
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
def test_a_file_is_not_passed_off_as_another(keyring: Keyring, other: Identity) -> None:
    """Though its key is the same."""
    with pytest.raises(ArtifactTampered, match="expected"):
        reopen(keyring, reseal(keyring, LONG), identity=other)


def test_a_file_under_somebody_elses_key_is_refused(keyring: Keyring) -> None:
    """Who may use another key cannot make a model of this name."""
    forged = seal_bytes(LONG, store=keyring, key="models/other", identity=MODEL)
    with pytest.raises(ArtifactTampered, match="models/other"):
        reopen(keyring, forged)


def test_a_rotated_key_opens_old_files_and_a_revoked_one_none(tmp_path: Path) -> None:
    """The store keeps old versions until the key is revoked."""
    keyring = Keyring.create(tmp_path / "keyring.json", b"k" * 32)
    keyring.ensure(KeyInfo(name=KEY))
    sealed = reseal(keyring, LONG)
    keyring.rotate(KEY)
    assert reopen(keyring, sealed) == LONG
    keyring.revoke(KEY)
    with pytest.raises(KeyRevoked):
        reopen(keyring, sealed)


def test_a_stream_is_read_and_written_in_pieces(small_chunks: None, keyring: Keyring) -> None:
    """No call reads more than a chunk, however long the file."""
    asked: list[int] = []

    class Source(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    target = io.BytesIO()
    envelope.seal(Source(LONG * 20), target, store=keyring, key=KEY, identity=MODEL)
    assert set(asked) == {SMALL_CHUNK}
    assert reopen(keyring, target.getvalue()) == LONG * 20


@given(value=st.binary(max_size=300), place=st.binary(max_size=40))
def test_a_value_opens_in_its_place_only(keyring: Keyring, value: bytes, place: bytes) -> None:
    """Also after the data key was unwrapped anew."""
    cipher, wrapped = ValueCipher.create(keyring, KEY)
    sealed = cipher.encrypt(value, place)
    again = ValueCipher.open(keyring, KEY, wrapped)
    assert again.decrypt(sealed, place) == value
    with pytest.raises(ArtifactTampered):
        again.decrypt(sealed, place + b"x")
    with pytest.raises(ArtifactTampered):
        again.decrypt(sealed[:-1], place)


@given(one=st.text("ab\0", max_size=4), other=st.text("ab\0", max_size=4), split=st.integers(0, 4))
def test_no_two_values_have_the_same_place(one: str, other: str, split: int) -> None:
    """Whatever a table's name ends with and a key begins with."""
    both = one + other
    table, entity = both[:split], both[split:].encode()
    same = (table, entity) == (one, other.encode())
    assert (place_of(one, other.encode()) == place_of(table, entity)) == same
