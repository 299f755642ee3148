"""The keyring's file: whole or refused, whoever writes, alters or kills."""

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
from cluster.security.keys.kek import (
    Derivation,
    create_kek_file,
    kek_from_file,
    kek_from_passphrase,
)
from cluster.security.keys.keyring import (
    KEK_NAME,
    NEW_KEK_NAME,
    RING_NAME,
    Keyring,
    open_local,
    open_with_passphrase,
    rotate_local_kek,
)
from cluster.security.keys.ringfile import derivation_of
from cluster.security.keys.store import (
    KeyEncryptionKeyWrong,
    KeyFileRefused,
    KeyInfo,
    KeyRevoked,
    KeyringDamaged,
    WrappedKeyInvalid,
    canonical,
)

KEK = bytes(range(32))
KILLS = int(os.environ.get("FALAJ_KILLS", "3"))
"""Of each crash test; `make chaos` has more."""
NAME = "features/income/personal"
INFO = KeyInfo(name=NAME, column_class="personal", purposes=("credit_scoring",))
SECRET = b"a data key of thirty-two bytes.."

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


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    """A keyring with one key of two versions."""
    ring = Keyring.create(tmp_path / RING_NAME, KEK)
    ring.ensure(INFO)
    ring.rotate(NAME)
    return ring


def script(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def killed_at_random(code: str, folder: Path) -> list[str]:
    """Run a loop, kill -9 it at some moment after its first line; gives its whole lines."""
    process = script(code, folder)
    assert process.stdout is not None
    first = process.stdout.readline()
    threading.Event().wait(random.random() * 0.03)
    process.kill()
    rest, _ = process.communicate()
    return [first.strip(), *(line for line in rest.split("\n")[:-1])]


def test_a_keyring_killed_while_rotating_loses_nothing(tmp_path: Path) -> None:
    """kill -9 at random moments: the file parses, every secret unwraps, every reported rotation is there."""
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


def test_a_key_encryption_key_rotation_that_is_killed_is_finished_or_undone(tmp_path: Path) -> None:
    """Whichever of the two files was replaced when the process died, the keyring opens and has everything."""
    ring = open_local(tmp_path)
    ring.ensure(INFO)
    text = ring.wrap(NAME, SECRET)
    for _ in range(KILLS):
        killed_at_random(ROTATE_KEK, tmp_path)
        assert open_local(tmp_path).unwrap(NAME, text) == SECRET
    rotate_local_kek(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "kek",
        "kek.lock",
        "keyring.json",
        "keyring.json.lock",
    }


@pytest.mark.parametrize("reached_the_ring", [False, True])
def test_a_key_encryption_key_rotation_resumes_from_each_side(tmp_path: Path, reached_the_ring: bool) -> None:
    """The new key lies beside the old one, and the keyring is under either."""
    ring = open_local(tmp_path)
    ring.ensure(INFO)
    text = ring.wrap(NAME, SECRET)
    old, new = kek_from_file(tmp_path / KEK_NAME), create_kek_file(tmp_path / NEW_KEK_NAME)
    if reached_the_ring:
        ring.rotate_kek(old, new)
    assert open_local(tmp_path).unwrap(NAME, text) == SECRET
    assert kek_from_file(tmp_path / KEK_NAME) == (new if reached_the_ring else old)


def test_two_processes_keep_each_others_changes(tmp_path: Path) -> None:
    """Each makes its keys while the other does; all are there."""
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


def test_every_altered_byte_is_damage(ring: Keyring, tmp_path: Path) -> None:
    """A flipped bit anywhere in the file is said to be damage, never a wrong key or an empty ring."""
    path = tmp_path / RING_NAME
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1 << random.randrange(8)]) + whole[position + 1 :]
        )
        with pytest.raises(KeyringDamaged, match="Restore it from a backup"):
            Keyring(path, KEK)
        with pytest.raises(KeyringDamaged):
            ring.info(NAME)
    path.write_bytes(whole)
    assert ring.info(NAME) == INFO


def test_every_truncation_is_damage(ring: Keyring, tmp_path: Path) -> None:
    """Also the empty file, and one with something behind it."""
    path = tmp_path / RING_NAME
    whole = path.read_bytes()
    for raw in (
        *(whole[:size] for size in range(len(whole))),
        whole + b" ",
        whole * 2,
        b"[]",
        b"null",
        b"[" * 100_000,
    ):
        path.write_bytes(raw)
        with pytest.raises(KeyringDamaged):
            Keyring(path, KEK)


def test_a_damaged_keyring_is_not_written_to(ring: Keyring, tmp_path: Path) -> None:
    """A change is refused and the bytes stay as they are, for whoever repairs them."""
    path = tmp_path / RING_NAME
    torn = path.read_bytes()[:-10]
    path.write_bytes(torn)
    for call in (
        lambda: ring.ensure(KeyInfo(name="x")),
        lambda: ring.rotate(NAME),
        lambda: ring.revoke(NAME),
    ):
        with pytest.raises(KeyringDamaged):
            call()
    assert path.read_bytes() == torn


def forged(path: Path, change: Any) -> None:
    """Change the body and make the digest right again, as an attacker without the key would."""
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
def test_a_skilful_change_without_the_key_is_refused(ring: Keyring, tmp_path: Path, change: Any) -> None:
    """Relabelling, removing or swapping is seen though the digest is right."""
    forged(tmp_path / RING_NAME, change)
    with pytest.raises(KeyringDamaged, match="changed without its key"):
        Keyring(tmp_path / RING_NAME, KEK)


def test_another_key_encryption_key_has_its_own_error(ring: Keyring, tmp_path: Path) -> None:
    """A whole file and a wrong key are told apart from damage."""
    with pytest.raises(KeyEncryptionKeyWrong, match="another key-encryption key"):
        Keyring(tmp_path / RING_NAME, bytes(32))
    with pytest.raises(ConfigError, match="32 bytes"):
        Keyring(tmp_path / RING_NAME, b"short")


def test_a_missing_keyring_is_never_made_silently(tmp_path: Path) -> None:
    """Not by opening it, and not beside a key-encryption key that belonged to one."""
    with pytest.raises(KeyringDamaged, match="No keyring at"):
        Keyring(tmp_path / RING_NAME, KEK)
    open_local(tmp_path)
    (tmp_path / RING_NAME).unlink()
    with pytest.raises(KeyringDamaged, match="though its key-encryption key is at"):
        open_local(tmp_path)


@pytest.mark.parametrize("made", [False, True])
def test_a_first_start_that_is_cut_off_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    """Before its keyring or after it; a key that may be the only one of a keyring's backup is not thrown away."""

    def die(*_: object) -> Keyring:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if made:
            patched.setattr(keyring_module, "_finish_kek_rotation", die)
        else:
            patched.setattr(Keyring, "create", die)
        with pytest.raises(KeyboardInterrupt):
            open_local(tmp_path)
    begun = kek_from_file(tmp_path / NEW_KEK_NAME)
    open_local(tmp_path).ensure(INFO)
    assert open_local(tmp_path).info(NAME) == INFO
    assert kek_from_file(tmp_path / KEK_NAME) == begun
    assert not (tmp_path / NEW_KEK_NAME).exists()


def test_a_keyring_without_its_key_encryption_key_is_refused(tmp_path: Path) -> None:
    """A new key-encryption key would only hide that the old one is lost."""
    open_local(tmp_path)
    (tmp_path / KEK_NAME).unlink()
    with pytest.raises(KeyFileRefused, match="No key-encryption key at"):
        open_local(tmp_path)
    with pytest.raises(ConfigError, match="never overwritten"):
        Keyring.create(tmp_path / RING_NAME, KEK)


def test_no_key_is_in_the_file_or_a_repr(tmp_path: Path) -> None:
    """Neither the key-encryption key nor a version of a key, in any spelling."""
    ring = Keyring.create(tmp_path / RING_NAME, KEK)
    ring.ensure(INFO)
    text = (tmp_path / RING_NAME).read_text() + repr(ring) + repr(ring._load())
    opened = ring._load()
    for key in (KEK, opened.version(opened.ring.keys[NAME], 1)):
        for spelled in (base64.b64encode(key).decode(), key.hex(), repr(key)):
            assert spelled not in text
    assert (tmp_path / RING_NAME).stat().st_mode & 0o777 == 0o600


def test_rotating_the_key_encryption_key_keeps_every_secret(ring: Keyring, tmp_path: Path) -> None:
    """Old texts unwrap, tombstones stay, the old key opens nothing any more, its holders are told."""
    ring.ensure(KeyInfo(name="gone"))
    ring.revoke("gone")
    text, bystander, new = (
        ring.wrap(NAME, SECRET),
        Keyring(tmp_path / RING_NAME, KEK),
        secrets.token_bytes(32),
    )
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


def test_a_secret_of_another_keyring_is_not_this_ones(ring: Keyring, tmp_path: Path) -> None:
    """The same name in two keyrings is two keys."""
    (tmp_path / "other").mkdir()
    other = open_local(tmp_path / "other")
    other.ensure(INFO)
    with pytest.raises(WrappedKeyInvalid):
        ring.unwrap(NAME, other.wrap(NAME, SECRET))


def test_revoking_removes_the_material_from_the_file(ring: Keyring, tmp_path: Path) -> None:
    """The tombstone has the description and no version."""
    ring.revoke(NAME)
    body = json.loads((tmp_path / RING_NAME).read_bytes())["body"]
    assert body["keys"][NAME]["versions"] == {}
    with pytest.raises(KeyRevoked):
        Keyring(tmp_path / RING_NAME, KEK).info(NAME)


def test_a_passphrase_opens_its_keyring_and_no_other_does(tmp_path: Path) -> None:
    """Salt and cost are in the header; the same passphrase in another normal form is the same."""
    path = tmp_path / RING_NAME
    open_with_passphrase(path, "correct horse bättery").ensure(INFO)
    assert open_with_passphrase(path, "correct horse ba\u0308ttery").info(NAME) == INFO
    with pytest.raises(KeyEncryptionKeyWrong):
        open_with_passphrase(path, "correct horse battery")
    stored = derivation_of(path)
    assert stored is not None
    assert (stored.n, stored.r, stored.p, len(stored.salt)) == (2**17, 8, 1, 16)


def test_weak_passphrases_and_parameters_are_refused(ring: Keyring, tmp_path: Path) -> None:
    """And a keyring whose key is a file asks for no passphrase."""
    with pytest.raises(ConfigError, match="at least 12 characters"):
        kek_from_passphrase("short", bytes(16))
    for parameters in ({"salt": b"x"}, {"n": 2**10}, {"n": 2**21}, {"n": 2**17 + 1}, {"r": 0}, {"p": 100}):
        with pytest.raises(ConfigError, match="scrypt"):
            Derivation(**{"salt": bytes(16), **parameters})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="comes from a file"):
        open_with_passphrase(tmp_path / RING_NAME, "correct horse battery")


def test_a_key_encryption_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    """0600, 32 random bytes, never overwritten, nothing left beside it."""
    made = create_kek_file(tmp_path / "kek")
    assert kek_from_file(tmp_path / "kek") == made != bytes(32)
    assert len(made) == 32
    assert (tmp_path / "kek").stat().st_mode & 0o7777 == 0o600
    with pytest.raises(KeyFileRefused, match="never overwritten"):
        create_kek_file(tmp_path / "kek")
    assert [path.name for path in tmp_path.iterdir()] == ["kek"]
    assert kek_from_file(tmp_path / "kek") == made


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o400, 0o700, 0o604])
def test_a_key_encryption_key_file_of_another_mode_is_refused(tmp_path: Path, mode: int) -> None:
    """The message says the mode and what to do."""
    create_kek_file(tmp_path / "kek")
    (tmp_path / "kek").chmod(mode)
    with pytest.raises(KeyFileRefused, match=f"mode {mode:04o}, not 0600"):
        kek_from_file(tmp_path / "kek")


def test_what_is_no_key_encryption_key_file_is_refused(tmp_path: Path) -> None:
    """Missing, a link, a folder, a pipe, too short, too long, another user's."""
    create_kek_file(tmp_path / "kek")
    (tmp_path / "link").symlink_to(tmp_path / "kek")
    (tmp_path / "folder").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, size in (("short", 31), ("long", 33), ("empty", 0)):
        (tmp_path / name).write_bytes(bytes(size))
        (tmp_path / name).chmod(0o600)
    for name in ("missing", "link", "folder", "pipe", "short", "long", "empty"):
        with pytest.raises(KeyFileRefused, match=name):
            kek_from_file(tmp_path / name)
    if os.geteuid() == 0:
        os.chown(tmp_path / "kek", 65534, 65534)
        with pytest.raises(KeyFileRefused, match="belongs to user 65534"):
            kek_from_file(tmp_path / "kek")
