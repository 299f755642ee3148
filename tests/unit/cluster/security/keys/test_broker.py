"""The key broker: tokens are verified, denials are recorded, and no request ends the process."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest

from cluster.errors import AccessDenied, FalajError, InvalidRequest, Unauthenticated
from cluster.security.keys.gate import Denial, Operation
from cluster.security.keys.store import (
    KeyEncryptionKeyWrong,
    KeyInfo,
    KeyNotFound,
    KeyringDamaged,
    KeyStoreUnavailable,
)
from cluster.security.keys.wire import MAX_BYTES
from tests.servers.key_broker_world import INFO, NAME, OPEN, SECRET, Failing, Person, World, framed


def test_permitted_principal_gets_the_secret_and_a_denial_is_recorded(world: World) -> None:
    """The denial names principal, operation, key, reason and policies. The error names who may not do what."""
    with world.serving():
        text = world.client("ana/credit_scoring").wrap(NAME, SECRET)
        assert world.client("ana/credit_scoring").unwrap(NAME, text) == SECRET
        assert world.denials == []
        with pytest.raises(AccessDenied, match=f"bob may not unwrap with key '{NAME}'") as caught:
            world.client("bob/marketing").unwrap(NAME, text)
        assert "credit_scoring" in str(caught.value)
        with pytest.raises(AccessDenied, match="denied by managing"):
            world.client("bob/marketing").rotate(NAME)
    bob: dict[str, Any] = {"principal": Person("bob", "marketing"), "name": NAME}
    assert world.denials == [
        Denial(operation="unwrap", reason="no policy allows it", **bob),
        Denial(operation="rotate", reason="denied by managing", policies=("managing",), **bob),
    ]


@pytest.mark.parametrize(
    "operation", [op for op in Operation if op not in (Operation.names, Operation.widen)]
)
def test_every_operation_is_checked_by_the_policy(world: World, operation: Operation) -> None:
    """Each is denied for another purpose, and changes nothing."""
    text = world.ring.wrap(NAME, SECRET)
    before = (world.path.parent / "keyring.json").read_bytes()
    with world.serving():
        bob = world.client("bob/marketing")
        calls: dict[Operation, Callable[[], object]] = {
            Operation.ensure: lambda: bob.ensure(KeyInfo(name=NAME, column_class="sensitive")),
            Operation.info: lambda: bob.info(NAME),
            Operation.wrap: lambda: bob.wrap(NAME, SECRET),
            Operation.unwrap: lambda: bob.unwrap(NAME, text),
            Operation.rewrap: lambda: bob.rewrap(NAME, text),
            Operation.rotate: lambda: bob.rotate(NAME),
            Operation.revoke: lambda: bob.revoke(NAME),
        }
        with pytest.raises(AccessDenied):
            calls[operation]()
    assert [(denial.operation, denial.name) for denial in world.denials] == [(operation.value, NAME)]
    assert (world.path.parent / "keyring.json").read_bytes() == before


def test_names_lists_only_visible_keys(world: World) -> None:
    """A key that is left out is not a denial."""
    with world.serving():
        assert world.client("ana/credit_scoring").names() == [OPEN.name, NAME]
        assert world.client("bob/marketing").names() == [OPEN.name]
        assert world.client("broken/x").names() == []
    assert world.denials == []


@pytest.mark.parametrize("token", ["", "nonsense", "boom"])
def test_unverifiable_token_is_unauthenticated(world: World, token: str) -> None:
    """The same holds if the verifier fails. The denial has no principal and does not contain the verifier's message."""
    with world.serving(), pytest.raises(Unauthenticated) as caught:
        world.client(token).info(NAME)
    assert "secret-token" not in str(caught.value)
    (denial,) = world.denials
    assert (denial.principal, denial.operation, denial.name) == (None, "info", NAME)
    assert "secret-token" not in denial.reason


@pytest.mark.parametrize("subject", ["broken", "strict"])
def test_failing_policy_denies(world: World, subject: str) -> None:
    with world.serving(), pytest.raises(AccessDenied, match=f"{subject} may not info"):
        world.client(f"{subject}/x").info(NAME)
    assert len(world.denials) == 1


def test_denial_stays_in_force_if_it_cannot_be_recorded(world: World) -> None:
    """The broker keeps running."""

    def audit(denial: Denial[Person]) -> None:
        raise OSError("disk full")

    with world.serving(audit=audit):
        with pytest.raises(AccessDenied):
            world.client("bob/marketing").info(NAME)
        assert world.client().info(NAME) == INFO


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (KeyNotFound("a"), KeyNotFound),
        (KeyringDamaged("a"), KeyringDamaged),
        (KeyEncryptionKeyWrong("a"), KeyEncryptionKeyWrong),
        (KeyStoreUnavailable("a"), KeyStoreUnavailable),
        (FalajError("a"), KeyStoreUnavailable),
        (RuntimeError("canary"), KeyStoreUnavailable),
    ],
)
def test_client_gets_the_same_error_class(world: World, raised: Exception, kind: type[Exception]) -> None:
    """The message of an unexpected error stays in the broker."""
    with world.serving(Failing(raised)), pytest.raises(FalajError) as caught:
        world.client().info(NAME)
    assert type(caught.value) is kind
    assert "canary" not in str(caught.value)


def test_hostile_bytes_never_end_the_broker(world: World) -> None:
    """After garbage, partial messages, deep nesting or wrong types, the next client is served."""
    good = {"op": "info", "token": "admin/x", "name": NAME}
    bodies: list[object] = [None, [], 1, "x", {}, {"op": 5}, {**good, "op": "explode"}, {**good, "op": []}]
    junk = (None, 5, [], {}, "\ud800", "x" * 100_000)
    bodies += [{**good, "token": value} for value in junk]
    bodies += [{**good, "name": value} for value in (*junk, "../../etc")]
    bodies += [{**good, "op": "wrap", "secret": value} for value in (*junk, "!!", "", "A" * 100_000)]
    bodies += [{**good, "op": "unwrap", "wrapped": value} for value in junk]
    bodies += [{**good, "op": "ensure", "info": value} for value in (*junk, {"name": NAME}, INFO.plain())]
    bodies += [{**good, "op": "ensure", "info": {**INFO.plain(), key: {}}} for key in INFO.plain()]
    messages = [framed(json.dumps(body).encode()) for body in bodies]
    messages += [framed(b"[" * 500_000), framed(b'{"op": 1' + b"0" * 10_000 + b"}")]
    messages += [framed(b"\xff\xfe"), framed(b""), b"", b"\0", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"]
    messages += [(MAX_BYTES + 1).to_bytes(4, "big")]
    messages += [framed(json.dumps(good).encode())[:size] for size in (1, 3, 4, 5, 20)]
    messages += [random.randbytes(random.randrange(1, 200)) for _ in range(100)]
    with world.serving():
        for message in messages:
            answer = world.raw(message)
            assert not answer or isinstance(json.loads(answer[4:])["ok"], bool)
        assert world.client().info(NAME) == INFO
    assert all(denial.name.isascii() and len(denial.name) <= 200 for denial in world.denials)


def test_oversized_message_is_refused_on_both_sides(world: World) -> None:
    """The broker refuses before it reads the message, the client before it sends it."""
    with world.serving():
        assert b"at most 1048576 bytes" in world.raw((MAX_BYTES + 1).to_bytes(4, "big") + b"x")
        client = world.client()
        with pytest.raises(InvalidRequest, match="at most 1048576 bytes"):
            client.unwrap(NAME, "x" * MAX_BYTES)
        assert client.info(NAME) == INFO


def test_slow_client_is_disconnected_and_delays_no_other(world: World) -> None:
    """Other clients are answered meanwhile."""
    with world.serving(read_s=0.3), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as slow:
        slow.connect(str(world.path))
        slow.settimeout(10)
        slow.sendall(b"\0\0")
        assert world.client().info(NAME) == INFO
        assert slow.recv(1) == b""
