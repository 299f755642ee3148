"""The key store in Vault, through hvac and a Vault double (tests/servers/vault_double.py)."""

from __future__ import annotations

import base64
import re
import socket
import string
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hvac
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import AccessDenied
from cluster.security.authorization.policy import Decision
from cluster.security.keys.gate import Gate, Operation
from cluster.security.keys.store import (
    KeyInfo,
    KeyNotFound,
    KeyRevoked,
    KeyStoreUnavailable,
    WrappedKeyInvalid,
)
from cluster.security.keys.vault import VaultKeyStore, flatten, unflatten
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from tests.servers.key_broker_world import INFO, NAME, SECRET
from tests.servers.vault_double import VaultDouble, store

FLAT = "falaj.features.income.personal"
SEGMENTS = st.from_regex(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,8}[A-Za-z0-9_])?", fullmatch=True)
NAMES = st.lists(SEGMENTS, min_size=1, max_size=5).map("/".join)


@given(NAMES)
def test_flattened_name_is_reversible_and_valid_in_transit(name: str) -> None:
    """Transit's names contain letters, digits, `_`, `-` and `.`, and begin and end with a word character."""
    assert unflatten(flatten(name)) == name
    assert re.fullmatch(r"\w([\w.-]*\w)?", flatten(name), re.ASCII)


@given(NAMES, NAMES)
def test_different_names_have_different_flattened_names(name: str, other: str) -> None:
    """Equal names have equal flattened names."""
    assert (flatten(name) == flatten(other)) == (name == other)


def test_refusal_of_vault_is_access_denied(double: VaultDouble) -> None:
    """Vault answers a missing right and an expired token alike."""
    vault = store(double)
    vault.ensure(INFO)
    text = vault.wrap(NAME, SECRET)
    with pytest.raises(AccessDenied, match=f"refused to decrypt with key '{NAME}'"):
        store(double, denied=("transit/decrypt/",)).unwrap(NAME, text)
    with pytest.raises(AccessDenied, match="token has expired"):
        store(double, ttl_s=-1.0).info(NAME)


def test_sealed_or_unreachable_vault_is_unavailable(double: VaultDouble) -> None:
    """The error is not a RefusedError, and does not contain the token."""
    vault = store(double)
    vault.ensure(INFO)
    double.state.sealed = True
    with pytest.raises(KeyStoreUnavailable, match="Vault is sealed"):
        vault.info(NAME)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(KeyStoreUnavailable, match="Is its address right") as caught:
        VaultKeyStore(hvac.Client(url=f"http://127.0.0.1:{port}", token="canary", timeout=2)).names()
    assert caught.value.__cause__ is None


def test_installations_with_different_prefixes_share_one_vault(double: VaultDouble) -> None:
    """Each sees only its own keys."""
    vault, other = store(double), VaultKeyStore(store(double)._client, prefix="other")
    vault.ensure(INFO)
    other.ensure(INFO)
    assert sorted(double.state.transit) == [FLAT, "other.features.income.personal"]
    assert vault.names() == other.names() == [NAME]
    with pytest.raises(WrappedKeyInvalid):
        other.unwrap(NAME, vault.wrap(NAME, SECRET))


def test_foreign_keys_in_the_engine_are_left_out(double: VaultDouble) -> None:
    """Transit's list contains the keys of all users of the engine."""
    vault = store(double)
    for name in ("alien", "falaj", "falajx.y", "falaj...x"):
        hvac.Client(url=double.address, token=double.root_token).secrets.transit.create_key(name=name)
    vault.ensure(INFO)
    assert vault.names() == [NAME]


def test_other_spellings_of_a_wrapped_secret_are_refused(double: VaultDouble) -> None:
    """Vault reads v0 as v1 and ignores stray bits of base64. The store accepts one spelling."""
    vault = store(double)
    vault.ensure(INFO)
    text = vault.wrap(NAME, b"x" * 16)  # 44 bytes sealed: two stray bits before the padding
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    other_spellings = [text.replace(":v1:", ":v0:"), f"{text[:-2]}{alphabet[alphabet.index(text[-2]) + 1]}="]
    aad = base64.b64encode(NAME.encode()).decode()
    for other in other_spellings:
        answer = vault._transit.decrypt_data(name=FLAT, ciphertext=other, associated_data=aad)
        assert base64.b64decode(answer["data"]["plaintext"]) == b"x" * 16
        with pytest.raises(WrappedKeyInvalid):
            vault.unwrap(NAME, other)


def test_name_is_authenticated_with_the_secret(double: VaultDouble) -> None:
    """Without the name or with another one, the same Transit key does not decrypt."""
    vault = store(double)
    vault.ensure(INFO)
    text = vault.wrap(NAME, SECRET)
    for aad in (None, base64.b64encode(b"features/other/personal").decode()):
        with pytest.raises(hvac.exceptions.InvalidRequest, match="message authentication failed"):
            vault._transit.decrypt_data(name=FLAT, ciphertext=text, associated_data=aad)
    with pytest.raises(hvac.exceptions.InvalidRequest, match="message authentication failed"):
        vault._transit.rewrap_data(name=FLAT, ciphertext=text)


def test_interrupted_revocation_can_be_completed(double: VaultDouble) -> None:
    """The tombstone is written first, and revokes the key. A policy of the broker decides by its description."""
    vault = store(double)
    vault.ensure(INFO)
    with pytest.raises(AccessDenied):
        store(double, denied=("DELETE transit/",)).revoke(NAME)
    with pytest.raises(KeyRevoked):
        vault.wrap(NAME, SECRET)
    decided: list[KeyInfo] = []

    def decide(who: Principal, operation: Operation, info: KeyInfo) -> Decision:
        decided.append(info)
        return Decision(allowed=who.role is Role.admin, policies=())

    gate: Gate[Principal] = Gate(
        vault,
        verify=lambda role: Principal(subject="a", role=Role(role), purpose="", expires_at=0),
        decide=decide,
        audit=lambda denial: None,
    )
    request = {"op": "revoke", "name": NAME}
    assert not gate.answer(request | {"token": "auditor"})["ok"]
    assert FLAT in double.state.transit
    assert gate.answer(request | {"token": "admin"})["ok"]
    assert double.state.transit == {}
    assert decided == [INFO, INFO]
    for again in (request, {"op": "rotate", "name": NAME}):
        assert "KeyRevoked" in str(gate.answer(again | {"token": "admin"}))


def test_interrupted_creation_can_be_completed(double: VaultDouble) -> None:
    """A Transit key without a description is not found, and `ensure` describes it."""
    vault = store(double)
    with pytest.raises(AccessDenied):
        store(double, denied=("POST secret/",)).ensure(INFO)
    with pytest.raises(KeyNotFound):
        vault.wrap(NAME, SECRET)
    vault.ensure(INFO)
    assert vault.unwrap(NAME, vault.wrap(NAME, SECRET)) == SECRET


def test_concurrent_descriptions_do_not_mix(double: VaultDouble) -> None:
    """With check-and-set, each writer has read the previous description."""
    infos = [KeyInfo(name=NAME, purposes=(f"purpose{number}",)) for number in range(6)]
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda info: store(double).ensure(info), infos))
    (versions,) = double.state.kv.values()
    assert store(double).info(NAME) in infos
    purposes = {version["info"]["purposes"][0] for version in versions}
    assert purposes == {f"purpose{number}" for number in range(6)}


def test_revocation_during_a_change_is_kept(double: VaultDouble) -> None:
    """A description is written only over the one that was read."""

    class Overtaken(VaultKeyStore):
        def _record(self, name: str) -> Any:
            record = super()._record(name)
            if FLAT in double.state.transit:
                store(double).revoke(name)
            return record

    store(double).ensure(INFO)
    with pytest.raises(KeyRevoked):
        Overtaken(store(double)._client).ensure(KeyInfo(name=NAME, column_class="public"))
    with pytest.raises(KeyRevoked):
        store(double).info(NAME)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"info": {}, "revoked": False},
        {"info": KeyInfo(name="other").plain(), "revoked": False},
        {"info": INFO.plain()},
    ],
)
def test_description_of_another_key_is_refused(double: VaultDouble, content: dict[str, object]) -> None:
    """It may have been swapped or edited in KV. The policy is not evaluated."""
    vault = store(double)
    vault.ensure(INFO)
    double.state.kv[f"falaj/keys/{flatten(NAME)}"].append(content)
    with pytest.raises(KeyStoreUnavailable, match="does not describe key"):
        vault.info(NAME)
