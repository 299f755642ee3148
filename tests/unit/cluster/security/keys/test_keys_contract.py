"""The contract of every key store, checked for the keyring, the keyring behind its broker, and Vault.

Vault is a double (tests/servers/vault_double.py), unless VAULT_ADDR and VAULT_TOKEN name a real one
with a Transit engine at `transit` and KV version 2 at `secret`.
"""

from __future__ import annotations

import base64
import os
import secrets
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import hvac
import pytest

from cluster.errors import InvalidRequest, RefusedError
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import (
    MAX_SECRET_BYTES,
    KeyInfo,
    KeyNameInvalid,
    KeyNotFound,
    KeyRevoked,
    KeyStore,
    WrappedKeyInvalid,
)
from cluster.security.keys.vault import VaultKeyStore
from tests.servers.key_broker_world import World
from tests.servers.vault_double import VaultDouble
from tests.servers.vault_double import store as vault_store

INCOME = KeyInfo(name="features/income/personal", column_class="personal", purposes=("credit_scoring",))
HEALTH = KeyInfo(name="features/health/sensitive", column_class="sensitive", region="eu", tenant="north")
SECRET = bytes(range(32))


def real_vault() -> VaultKeyStore:
    """Return the Vault at VAULT_ADDR, with a unique prefix."""
    if not os.environ.get("VAULT_ADDR"):
        pytest.skip("no real Vault: set VAULT_ADDR and VAULT_TOKEN to run the contract against one")
    return VaultKeyStore(hvac.Client(timeout=10), prefix=f"falaj-test-{uuid.uuid4().hex}")


@pytest.fixture(params=["keyring", "broker", "vault_double", "vault"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeyStore]:
    """Each key store, empty."""
    with ExitStack() as stack:
        match request.param:
            case "keyring":
                yield Keyring.create(tmp_path / "keyring.json", secrets.token_bytes(32))
            case "broker":
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fk-")))
                world = World(
                    folder / "k.sock", Keyring.create(folder / "keyring.json", secrets.token_bytes(32))
                )
                stack.enter_context(world.serving())
                yield stack.enter_context(closing(world.client()))
            case "vault_double":
                yield vault_store(stack.enter_context(VaultDouble()))
            case _:
                vault = real_vault()
                yield vault
                for name in vault.names():
                    vault.revoke(name)


def uses(store: KeyStore, name: str, text: str) -> list[Callable[[], object]]:
    """Return every call that needs the key `name`."""
    return [
        lambda: store.info(name),
        lambda: store.wrap(name, SECRET),
        lambda: store.unwrap(name, text),
        lambda: store.rewrap(name, text),
        lambda: store.rotate(name),
        lambda: store.revoke(name),
    ]


def test_unwrap_returns_the_wrapped_secret(store: KeyStore) -> None:
    """The text contains scheme and version, and two texts of one secret differ."""
    store.ensure(INCOME)
    texts = [store.wrap(INCOME.name, SECRET) for _ in range(3)]
    assert [store.unwrap(INCOME.name, text) for text in texts] == [SECRET] * 3
    assert len(set(texts)) == 3
    for text in texts:
        scheme, version, sealed = text.split(":")
        assert scheme in ("kr", "vault")
        assert version == "v1"
        assert SECRET not in base64.b64decode(sealed, b"-_" if scheme == "kr" else b"+/")


def test_secrets_of_every_allowed_size_can_be_wrapped(store: KeyStore) -> None:
    """From 1 byte to 64 KiB. Empty and larger secrets are refused."""
    store.ensure(INCOME)
    for size in (1, 16, 33, MAX_SECRET_BYTES):
        secret = secrets.token_bytes(size)
        assert store.unwrap(INCOME.name, store.wrap(INCOME.name, secret)) == secret
    for size in (0, MAX_SECRET_BYTES + 1):
        with pytest.raises(InvalidRequest, match="wraps 1 to 65536 bytes"):
            store.wrap(INCOME.name, bytes(size))


def test_info_returns_the_description(store: KeyStore) -> None:
    """The description is returned unchanged. The list of names is empty before the first key."""
    assert store.names() == []
    store.ensure(INCOME)
    store.ensure(HEALTH)
    assert store.info(INCOME.name) == INCOME
    assert store.info(HEALTH.name) == HEALTH
    assert store.names() == [HEALTH.name, INCOME.name]


def test_second_ensure_updates_only_the_description(store: KeyStore) -> None:
    """Secrets wrapped before a change of purposes still unwrap, under every version."""
    store.ensure(INCOME)
    first = store.wrap(INCOME.name, SECRET)
    store.rotate(INCOME.name)
    second = store.wrap(INCOME.name, SECRET)
    store.ensure(INCOME)
    changed = KeyInfo(
        name=INCOME.name, column_class="sensitive", purposes=("audit", "credit_scoring"), region="eu"
    )
    store.ensure(changed)
    assert store.info(INCOME.name) == changed
    assert store.unwrap(INCOME.name, first) == store.unwrap(INCOME.name, second) == SECRET
    assert store.names() == [INCOME.name]


def test_missing_key_is_not_found_and_not_created(store: KeyStore) -> None:
    store.ensure(HEALTH)
    text = store.wrap(HEALTH.name, SECRET)
    for call in uses(store, INCOME.name, text):
        with pytest.raises(KeyNotFound, match=INCOME.name):
            call()
    assert store.names() == [HEALTH.name]


def test_wrapped_secret_is_bound_to_its_name(store: KeyStore) -> None:
    store.ensure(INCOME)
    store.ensure(HEALTH)
    income, health = store.wrap(INCOME.name, SECRET), store.wrap(HEALTH.name, SECRET)
    for name, text in ((INCOME.name, health), (HEALTH.name, income)):
        with pytest.raises(WrappedKeyInvalid, match=name):
            store.unwrap(name, text)
        with pytest.raises(WrappedKeyInvalid, match=name):
            store.rewrap(name, text)


def test_flipped_bit_in_a_wrapped_secret_is_refused(store: KeyStore) -> None:
    """One bit of each character, also with several key versions."""
    store.ensure(INCOME)
    text = store.wrap(INCOME.name, SECRET)
    store.rotate(INCOME.name)
    store.rotate(INCOME.name)
    for position, letter in enumerate(text):
        flipped = text[:position] + chr(ord(letter) ^ 1 << position % 8) + text[position + 1 :]
        with pytest.raises(WrappedKeyInvalid):
            store.unwrap(INCOME.name, flipped)
    assert store.unwrap(INCOME.name, text) == SECRET


def test_truncation_and_other_spellings_are_refused(store: KeyStore) -> None:
    """A wrapped secret has one valid spelling."""
    store.ensure(INCOME)
    text = store.wrap(INCOME.name, SECRET)
    scheme, _, sealed = text.split(":")
    others = [text[:size] for size in range(len(text))]
    others += [f"{text}{tail}" for tail in (" ", "\n", "=", "AAAA", "\0")]
    others += [f" {text}", text.upper(), "ü" * 90]
    versions = ("v0", "v01", "v2", "v-1", "v+1", "v 1", "1", "v" + "9" * 30)
    others += [f"{scheme}:{version}:{sealed}" for version in versions]
    others += [f"other:v1:{sealed}", f"{scheme}:v1:", f"{scheme}:v1:{sealed[:-1]}", sealed]
    for other in others:
        with pytest.raises(WrappedKeyInvalid):
            store.unwrap(INCOME.name, other)


def test_rotation_adds_a_version(store: KeyStore) -> None:
    """Old texts still unwrap. Versions count from 1."""
    store.ensure(INCOME)
    texts = [store.wrap(INCOME.name, SECRET)]
    for version in (2, 3):
        assert store.rotate(INCOME.name) == version
        texts.append(store.wrap(INCOME.name, SECRET))
    assert [text.split(":")[1] for text in texts] == ["v1", "v2", "v3"]
    assert [store.unwrap(INCOME.name, text) for text in texts] == [SECRET] * 3


def test_rewrap_uses_the_newest_version(store: KeyStore) -> None:
    """The secret is the same, the text is new."""
    store.ensure(INCOME)
    old = store.wrap(INCOME.name, SECRET)
    store.rotate(INCOME.name)
    new = store.rewrap(INCOME.name, old)
    assert new.split(":")[1] == "v2"
    assert store.unwrap(INCOME.name, new) == SECRET


def test_revoked_key_is_lost(store: KeyStore) -> None:
    """Every operation raises KeyRevoked, the name cannot be used again, and other keys still work."""
    store.ensure(INCOME)
    store.ensure(HEALTH)
    text, other = store.wrap(INCOME.name, SECRET), store.wrap(HEALTH.name, SECRET)
    store.rotate(INCOME.name)
    store.revoke(INCOME.name)
    for call in (lambda: store.ensure(INCOME), *uses(store, INCOME.name, text)):
        with pytest.raises(KeyRevoked, match=INCOME.name):
            call()
    assert store.names() == [HEALTH.name]
    assert store.unwrap(HEALTH.name, other) == SECRET


def test_invalid_names_are_refused(store: KeyStore) -> None:
    """All stores give the same error, without a request to Vault."""
    names = ["", "/", "a/", "/a", "a//b", "a/../b", "..", ".a", "a.", "-a", "a-", "a b", "a\n", "a\0b"]
    names += ["naïve/x", "a/ü", "a:b", "a%2fb", "a\\b", "a" * 201, "\ud800"]
    for name in names:
        for call in (lambda name=name: KeyInfo(name=name), *uses(store, name, "kr:v1:AAAA")):
            with pytest.raises(KeyNameInvalid, match="A name is a path such as"):
                call()


def test_similar_names_are_different_keys(store: KeyStore) -> None:
    """Independent of the characters that the underlying store allows."""
    names = ["A/b", "_", "a", "a-b", "a.b", "a..b", "a/b", "a/b.c", "a.b/c", "a/b/c", "a_b", "models/m.v2"]
    for name in names:
        store.ensure(KeyInfo(name=name))
    assert store.names() == sorted(names)
    texts = {name: store.wrap(name, name.encode()) for name in names}
    assert {name: store.unwrap(name, text) for name, text in texts.items()} == {n: n.encode() for n in names}


def test_errors_contain_no_secret_and_no_wrapped_text(store: KeyStore) -> None:
    """Errors are logged; secrets must not be."""
    store.ensure(INCOME)
    text = store.wrap(INCOME.name, b"canary-canary-canary")
    calls = [
        lambda: store.unwrap(INCOME.name, text[:-4] + "AAAA"),
        lambda: store.unwrap(INCOME.name, f"canary{text}"),
        lambda: store.wrap("features/none/personal", b"canary-canary-canary"),
        lambda: store.wrap(INCOME.name, b"canary" * MAX_SECRET_BYTES),
    ]
    for call in calls:
        with pytest.raises(RefusedError) as caught:
            call()
        assert "canary" not in f"{caught.value!r} {caught.value.__cause__!r}"
        assert text[8:30] not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_store_is_thread_safe(store: KeyStore) -> None:
    """Every rotation is counted, and concurrently wrapped secrets unwrap."""
    store.ensure(INCOME)
    texts: list[str] = []
    versions: list[int] = []

    def work() -> None:
        for _ in range(3):
            texts.append(store.wrap(INCOME.name, SECRET))
            versions.append(store.rotate(INCOME.name))
            texts.append(store.wrap(INCOME.name, SECRET))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: work(), range(4)))
    assert max(versions) == 13
    assert len(texts) == 24
    assert {store.unwrap(INCOME.name, text) for text in texts} == {SECRET}
