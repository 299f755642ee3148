"""The keyring's file: intact or refused, after any write, change or kill."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.security.keys import keyring as keyring_module
from cluster.security.keys.kek import create_kek_file, kek_from_file
from cluster.security.keys.keyring import (
    KEK_NAME,
    NEW_KEK_NAME,
    RING_NAME,
    Keyring,
    open_local,
    rotate_local_kek,
)
from cluster.security.keys.store import (
    KeyEncryptionKeyWrong,
    KeyFileRefused,
    KeyInfo,
    KeyRevoked,
    KeyringDamaged,
    WrappedKeyInvalid,
    canonical,
)
from tests.servers.key_broker_world import INFO, NAME, SECRET

KEK = bytes(range(32))
KILLS = int(os.environ.get("FALAJ_KILLS", "3"))
"""Kills per crash test; `make chaos` uses more."""

ROTATE = """
import sys
from pathlib import Path
from cluster.security.keys.keyring import open_local
ring = open_local(Path(sys.argv[1]))
while True:
    print(ring.rotate("features/income/personal"), flush=True)
"""
ROTATE_KEK = """
import sys
from pathlib import Path
from cluster.security.keys.keyring import rotate_local_kek
while True:
    rotate_local_kek(Path(sys.argv[1]))
    print("rotated", flush=True)
"""
ENSURE = """
import sys
from pathlib import Path
from cluster.security.keys.keyring import open_local
from cluster.security.keys.store import KeyInfo
ring = open_local(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    ring.ensure(KeyInfo(name=f"{sys.argv[2]}/{number}"))
"""


def script(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def killed_at_random(code: str, folder: Path) -> list[str]:
    """Run a loop, kill it with SIGKILL soon after its first line, and return its complete lines."""
    process = script(code, folder)
    assert process.stdout is not None
    first = process.stdout.readline()
    threading.Event().wait(random.random() * 0.03)
    process.kill()
    rest, _ = process.communicate()
    return [first.strip(), *rest.split("\n")[:-1]]


def test_kill_during_rotation_loses_nothing(tmp_path: Path) -> None:
    """After kill -9 at random moments, the file parses, every secret unwraps, and every reported rotation is there."""
    ring = open_local(tmp_path)
    ring.ensure(INFO)
    texts = [ring.wrap(NAME, SECRET)]
    for _ in range(KILLS):
        reported = killed_at_random(ROTATE, tmp_path)
        ring = open_local(tmp_path)
        texts.append(ring.wrap(NAME, SECRET))
        assert int(texts[-1].split(":")[1][1:]) >= int(reported[-1])
        assert {ring.unwrap(NAME, text) for text in texts} == {SECRET}
    assert ring.info(NAME) == INFO
    ring.rotate(NAME)
    assert list(tmp_path.glob(".*.tmp")) == []


def test_kill_during_kek_rotation_is_completed_or_undone(tmp_path: Path) -> None:
    """The keyring opens with all keys, whichever of the two files was replaced before the kill."""
    ring = open_local(tmp_path)
    ring.ensure(INFO)
    text = ring.wrap(NAME, SECRET)
    for _ in range(KILLS):
        killed_at_random(ROTATE_KEK, tmp_path)
        assert open_local(tmp_path).unwrap(NAME, text) == SECRET
    rotate_local_kek(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"kek", "kek.lock", "keyring.json", "keyring.json.lock"}


@pytest.mark.parametrize("reached_the_ring", [False, True])
def test_kek_rotation_resumes_before_and_after_the_ring_changed(
    tmp_path: Path, reached_the_ring: bool
) -> None:
    """Both keys are on disk, and the keyring is under one of them."""
    ring = open_local(tmp_path)
    ring.ensure(INFO)
    text = ring.wrap(NAME, SECRET)
    old, new = kek_from_file(tmp_path / KEK_NAME), create_kek_file(tmp_path / NEW_KEK_NAME)
    if reached_the_ring:
        ring.rotate_kek(old, new)
    assert open_local(tmp_path).unwrap(NAME, text) == SECRET
    assert kek_from_file(tmp_path / KEK_NAME) == (new if reached_the_ring else old)


def test_concurrent_writers_keep_each_others_changes(tmp_path: Path) -> None:
    """Two processes add keys at the same time, and all keys are there."""
    ring = open_local(tmp_path)
    processes = [script(ENSURE, tmp_path, name) for name in ("left", "right")]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0]
    assert ring.names() == sorted(f"{side}/{number}" for side in ("left", "right") for number in range(60))


def test_every_flipped_bit_is_reported_as_damage(ring: Keyring, tmp_path: Path) -> None:
    """It is never reported as a wrong key or an empty keyring."""
    path = tmp_path / RING_NAME
    intact = path.read_bytes()
    for position in range(len(intact)):
        path.write_bytes(
            intact[:position] + bytes([intact[position] ^ 1 << random.randrange(8)]) + intact[position + 1 :]
        )
        with pytest.raises(KeyringDamaged, match="Restore it from a backup"):
            Keyring(path, KEK)
        with pytest.raises(KeyringDamaged):
            ring.info(NAME)
    path.write_bytes(intact)
    assert ring.info(NAME) == INFO


def test_every_truncation_is_reported_as_damage(ring: Keyring, tmp_path: Path) -> None:
    """An empty file and a file with extra bytes are reported, too."""
    path = tmp_path / RING_NAME
    intact = path.read_bytes()
    truncated = [intact[:size] for size in range(len(intact))]
    for raw in (*truncated, intact + b" ", intact * 2, b"[]", b"null", b"[" * 100_000):
        path.write_bytes(raw)
        with pytest.raises(KeyringDamaged):
            Keyring(path, KEK)


def test_damaged_keyring_is_not_changed(ring: Keyring, tmp_path: Path) -> None:
    """Writes are refused and the bytes stay, so that the file can be repaired."""
    path = tmp_path / RING_NAME
    damaged = path.read_bytes()[:-10]
    path.write_bytes(damaged)
    for call in (
        lambda: ring.ensure(KeyInfo(name="x")),
        lambda: ring.rotate(NAME),
        lambda: ring.revoke(NAME),
    ):
        with pytest.raises(KeyringDamaged):
            call()
    assert path.read_bytes() == damaged


def forged(path: Path, change: Any) -> None:
    """Change the body and correct the digest, as an attacker without the key would."""
    whole = json.loads(path.read_bytes())
    change(whole["body"])
    whole["sha256"] = base64.b64encode(hashlib.sha256(canonical(whole["body"])).digest()).decode()
    path.write_bytes(canonical(whole) + b"\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["keys"][NAME]["info"].update(column_class="public"),
        lambda body: body["keys"][NAME]["info"].update(purposes=[]),
        lambda body: body["keys"].pop(NAME),
        lambda body: body["keys"][NAME].update(newest=1),
        lambda body: body["keys"][NAME]["versions"].pop("1"),
        lambda body: body["keys"][NAME]["versions"].update({"1": body["keys"][NAME]["versions"]["2"]}),
        lambda body: body.update(keys={}),
        lambda body: body.update(scrypt={"salt": "AAAAAAAAAAAAAAAAAAAAAA==", "n": 2**14, "r": 8, "p": 1}),
    ],
)
def test_change_with_a_correct_digest_is_refused(ring: Keyring, tmp_path: Path, change: Any) -> None:
    """Relabelled, removed and swapped keys are detected by the HMAC."""
    forged(tmp_path / RING_NAME, change)
    with pytest.raises(KeyringDamaged, match="changed without its key"):
        Keyring(tmp_path / RING_NAME, KEK)


def test_wrong_kek_has_its_own_error(ring: Keyring, tmp_path: Path) -> None:
    with pytest.raises(KeyEncryptionKeyWrong, match="another key-encryption key"):
        Keyring(tmp_path / RING_NAME, bytes(32))
    with pytest.raises(ConfigError, match="32 bytes"):
        Keyring(tmp_path / RING_NAME, b"short")


def test_missing_keyring_is_never_created_silently(tmp_path: Path) -> None:
    """Neither by opening it, nor beside an existing key-encryption key."""
    with pytest.raises(KeyringDamaged, match="No keyring at"):
        Keyring(tmp_path / RING_NAME, KEK)
    open_local(tmp_path)
    (tmp_path / RING_NAME).unlink()
    with pytest.raises(KeyringDamaged, match="though its key-encryption key is at"):
        open_local(tmp_path)


@pytest.mark.parametrize("ring_exists", [False, True])
def test_interrupted_first_start_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ring_exists: bool
) -> None:
    """Before and after the keyring is created. The first key-encryption key stays in use."""

    def die(*_: object) -> Keyring:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if ring_exists:
            patched.setattr(keyring_module, "_finish_kek_rotation", die)
        else:
            patched.setattr(Keyring, "create", die)
        with pytest.raises(KeyboardInterrupt):
            open_local(tmp_path)
    first_kek = kek_from_file(tmp_path / NEW_KEK_NAME)
    open_local(tmp_path).ensure(INFO)
    assert open_local(tmp_path).info(NAME) == INFO
    assert kek_from_file(tmp_path / KEK_NAME) == first_kek
    assert not (tmp_path / NEW_KEK_NAME).exists()


def test_keyring_without_its_kek_is_refused(tmp_path: Path) -> None:
    """A new key-encryption key would hide the loss of the old one."""
    open_local(tmp_path)
    (tmp_path / KEK_NAME).unlink()
    with pytest.raises(KeyFileRefused, match="No key-encryption key at"):
        open_local(tmp_path)
    with pytest.raises(ConfigError, match="never overwritten"):
        Keyring.create(tmp_path / RING_NAME, KEK)


def test_file_and_repr_contain_no_key(tmp_path: Path) -> None:
    """Neither the key-encryption key nor a version of a key, in any encoding."""
    ring = Keyring.create(tmp_path / RING_NAME, KEK)
    ring.ensure(INFO)
    text = (tmp_path / RING_NAME).read_text() + repr(ring) + repr(ring._load())
    opened = ring._load()
    for key in (KEK, opened.version(opened.ring.keys[NAME], 1)):
        for spelled in (base64.b64encode(key).decode(), key.hex(), repr(key)):
            assert spelled not in text
    assert (tmp_path / RING_NAME).stat().st_mode & 0o777 == 0o600


def test_kek_rotation_keeps_every_secret_and_tombstone(ring: Keyring, tmp_path: Path) -> None:
    """The old key opens nothing, and its holders get KeyEncryptionKeyWrong."""
    ring.ensure(KeyInfo(name="gone"))
    ring.revoke("gone")
    text, bystander = ring.wrap(NAME, SECRET), Keyring(tmp_path / RING_NAME, KEK)
    new = secrets.token_bytes(32)
    before = (tmp_path / RING_NAME).read_bytes()
    with pytest.raises(KeyEncryptionKeyWrong):
        ring.rotate_kek(bytes(32), new)
    assert (tmp_path / RING_NAME).read_bytes() == before
    ring.rotate_kek(KEK, new)
    assert ring.unwrap(NAME, text) == Keyring(tmp_path / RING_NAME, new).unwrap(NAME, text) == SECRET
    with pytest.raises(KeyEncryptionKeyWrong):
        bystander.unwrap(NAME, text)
    with pytest.raises(KeyRevoked):
        ring.info("gone")


def test_secret_of_another_keyring_is_refused(ring: Keyring, tmp_path: Path) -> None:
    """Keys of the same name in two keyrings differ."""
    (tmp_path / "other").mkdir()
    other = open_local(tmp_path / "other")
    other.ensure(INFO)
    with pytest.raises(WrappedKeyInvalid):
        ring.unwrap(NAME, other.wrap(NAME, SECRET))


def test_revocation_removes_every_version_from_the_file(ring: Keyring, tmp_path: Path) -> None:
    """The tombstone keeps the description."""
    ring.revoke(NAME)
    body = json.loads((tmp_path / RING_NAME).read_bytes())["body"]
    assert body["keys"][NAME]["versions"] == {}
    with pytest.raises(KeyRevoked):
        Keyring(tmp_path / RING_NAME, KEK).info(NAME)
