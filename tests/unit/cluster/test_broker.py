"""The key broker: who asks is verified, what is not permitted is denied and recorded, and nothing ends it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import AccessDenied, ConfigError, FalajError, InvalidRequest, Unauthenticated
from cluster.security.keys import client as client_module
from cluster.security.keys.broker import Broker, peer_allowed
from cluster.security.keys.client import BrokerKeyStore
from cluster.security.keys.gate import Denial, Operation
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import (
    KeyEncryptionKeyWrong,
    KeyInfo,
    KeyNotFound,
    KeyringDamaged,
    KeyStoreUnavailable,
)
from cluster.security.keys.wire import MAX_BYTES

NAME = "features/income/personal"
INFO = KeyInfo(name=NAME, column_class="personal", purposes=("credit_scoring",))
OPEN = KeyInfo(name="features/income/internal", column_class="internal")
SECRET = b"a data key of thirty-two bytes.."


@dataclass(frozen=True)
class Person:
    """A principal."""

    subject: str
    purpose: str


@dataclass(frozen=True)
class Ruling:
    """A policy's decision."""

    allowed: bool
    policies: tuple[str, ...]


def verify(token: str) -> Person:
    """Tokens here are `subject/purpose`."""
    if token == "boom":
        raise RuntimeError("the verifier broke over secret-token")
    subject, slash, purpose = token.partition("/")
    if not slash:
        raise Unauthenticated("The token is not valid: no purpose.")
    return Person(subject, purpose)


def decide(principal: Person, operation: Operation, info: KeyInfo) -> Ruling:
    """Admins may do all; others may use what has their purpose, and manage internal keys."""
    if principal.subject == "broken":
        raise RuntimeError("the policy broke")
    if principal.subject == "strict":
        raise AccessDenied("strict is never allowed.")
    if principal.subject == "admin":
        return Ruling(True, ("admins",))
    if operation in (Operation.ensure, Operation.rotate, Operation.revoke):
        return Ruling(info.column_class == "internal", ("managing",))
    fits = not info.purposes or principal.purpose in info.purposes
    return Ruling(fits, ("purpose",) if fits else ())


@dataclass
class World:
    """A keyring with its broker, and what was denied."""

    path: Path
    ring: Keyring
    denials: list[Denial[Person]] = field(default_factory=list)

    def client(self, token: str = "admin/all") -> BrokerKeyStore:  # noqa: S107 (test data)
        return BrokerKeyStore(self.path, lambda: token, timeout_s=5.0)

    @contextmanager
    def serving(self, store: Any = None, **options: Any) -> Iterator[threading.Event]:
        audit = options.pop("audit", self.denials.append)
        broker = Broker(store or self.ring, self.path, verify=verify, decide=decide, audit=audit, **options)
        stopped = threading.Event()
        thread = threading.Thread(target=broker.run, args=(stopped,))
        thread.start()
        try:
            until(self.path.is_socket)
            yield stopped
        finally:
            stopped.set()
            thread.join(20)
            assert not thread.is_alive()

    def raw(self, data: bytes) -> bytes:
        """What the broker sends for some bytes until it closes or falls silent."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(5.0)
            connection.connect(str(self.path))
            got = b""
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    got += part
            except OSError:
                pass
            return got


def until(holds: Callable[[], bool]) -> None:
    """Poll with a deadline."""
    deadline, pause = time.monotonic() + 10, threading.Event()
    while not holds():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def answers(path: Path) -> bool:
    """Whether somebody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.fixture
def world() -> Iterator[World]:
    """A keyring with two keys in a folder with a short path; the broker is not yet started."""
    with tempfile.TemporaryDirectory(prefix="fk-") as folder:
        ring = Keyring.create(Path(folder) / "keyring.json", secrets.token_bytes(32))
        ring.ensure(INFO)
        ring.ensure(OPEN)
        yield World(Path(folder) / "k.sock", ring)


def test_a_permitted_principal_gets_the_secret_and_another_is_denied_on_record(world: World) -> None:
    """The denial names principal, operation, key, reason and policies; the error says who may not do what."""
    with world.serving():
        text = world.client("ana/credit_scoring").wrap(NAME, SECRET)
        assert world.client("ana/credit_scoring").unwrap(NAME, text) == SECRET
        assert world.denials == []
        with pytest.raises(AccessDenied, match=f"bob may not unwrap with key '{NAME}'") as caught:
            world.client("bob/marketing").unwrap(NAME, text)
        assert "credit_scoring" in str(caught.value)
        with pytest.raises(AccessDenied, match="denied by managing"):
            world.client("bob/marketing").rotate(NAME)
    assert world.denials == [
        Denial(
            principal=Person("bob", "marketing"), operation="unwrap", name=NAME, reason="no policy allows it"
        ),
        Denial(
            principal=Person("bob", "marketing"),
            operation="rotate",
            name=NAME,
            reason="denied by managing",
            policies=("managing",),
        ),
    ]


@pytest.mark.parametrize(
    "operation", [each for each in Operation if each not in (Operation.names, Operation.widen)]
)
def test_no_operation_goes_past_the_policy(world: World, operation: Operation) -> None:
    """Each is denied to a stranger to the purpose, and changes nothing."""
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


def test_relabelling_a_key_needs_the_right_to_the_present_one(world: World) -> None:
    """Who may make internal keys cannot turn a personal one into one."""
    with world.serving():
        bob = world.client("bob/marketing")
        bob.ensure(KeyInfo(name="features/new/internal", column_class="internal"))
        with pytest.raises(AccessDenied, match="class personal"):
            bob.ensure(KeyInfo(name=NAME, column_class="internal"))
    assert world.ring.info(NAME) == INFO


def test_names_show_only_what_the_principal_may_know(world: World) -> None:
    """Leaving a name out is no denial."""
    with world.serving():
        assert world.client("ana/credit_scoring").names() == [OPEN.name, NAME]
        assert world.client("bob/marketing").names() == [OPEN.name]
        assert world.client("broken/x").names() == []
    assert world.denials == []


@pytest.mark.parametrize("token", ["", "nonsense", "boom"])
def test_a_token_that_cannot_be_verified_is_unauthenticated(world: World, token: str) -> None:
    """Also when the verifier breaks; recorded without a principal, and without the verifier's own words."""
    with world.serving(), pytest.raises(Unauthenticated) as caught:
        world.client(token).info(NAME)
    assert "secret-token" not in str(caught.value)
    (denial,) = world.denials
    assert (denial.principal, denial.operation, denial.name) == (None, "info", NAME)
    assert "secret-token" not in denial.reason


@pytest.mark.parametrize("subject", ["broken", "strict"])
def test_what_the_policy_cannot_decide_is_denied(world: World, subject: str) -> None:
    """A policy that raises does not permit."""
    with world.serving(), pytest.raises(AccessDenied, match=f"{subject} may not info"):
        world.client(f"{subject}/x").info(NAME)
    assert len(world.denials) == 1


def test_a_denial_stands_when_it_cannot_be_recorded(world: World) -> None:
    """And the broker goes on."""

    def audit(denial: Denial[Person]) -> None:
        raise OSError("disk full")

    with world.serving(audit=audit):
        with pytest.raises(AccessDenied):
            world.client("bob/marketing").info(NAME)
        assert world.client().info(NAME) == INFO


class Failing:
    """A fake store whose calls raise."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def info(self, name: str) -> KeyInfo:
        raise self.error


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
def test_errors_arrive_as_what_they_were(world: World, raised: Exception, kind: type[Exception]) -> None:
    """Exact classes; the words of an unforeseen one stay in the broker."""
    with world.serving(Failing(raised)), pytest.raises(FalajError) as caught:
        world.client().info(NAME)
    assert type(caught.value) is kind
    assert "canary" not in str(caught.value)


def test_hostile_bytes_never_end_the_broker(world: World) -> None:
    """Garbage, half messages, deep nesting, wrong types: an error or silence, and the next caller is served."""
    good = {"op": "info", "token": "admin/x", "name": NAME}
    bodies: list[object] = [None, [], 1, "x", {}, {"op": 5}, {**good, "op": "explode"}, {**good, "op": []}]
    bodies += [{**good, "token": value} for value in (None, 5, [], {}, "\ud800", "x" * 100_000)]
    bodies += [{**good, "name": value} for value in (None, 5, [], {}, "\ud800", "../../etc", "x" * 100_000)]
    bodies += [
        {**good, "op": "wrap", "secret": value} for value in (None, 5, "!!", "\ud800", "", "A" * 100_000)
    ]
    bodies += [{**good, "op": "unwrap", "wrapped": value} for value in (None, 5, [], "\ud800", "x" * 100_000)]
    bodies += [
        {**good, "op": "ensure", "info": value} for value in (None, 5, [], {}, {"name": NAME}, INFO.plain())
    ]
    bodies += [{**good, "op": "ensure", "info": {**INFO.plain(), key: {}}} for key in INFO.plain()]
    messages = [framed(json.dumps(body).encode()) for body in bodies]
    messages += [
        framed(b"[" * 500_000),
        framed(b"\xff\xfe"),
        framed(b'{"op": 1' + b"0" * 10_000 + b"}"),
        framed(b""),
    ]
    messages += [
        b"",
        b"\0",
        b"\xff\xff\xff\xff",
        (MAX_BYTES + 1).to_bytes(4, "big"),
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    messages += [framed(json.dumps(good).encode())[:size] for size in (1, 3, 4, 5, 20)]
    messages += [random.randbytes(random.randrange(1, 200)) for _ in range(100)]
    with world.serving():
        for message in messages:
            got = world.raw(message)
            assert not got or isinstance(json.loads(got[4:])["ok"], bool)
        assert world.client().info(NAME) == INFO
    assert all(denial.name.isascii() and len(denial.name) <= 200 for denial in world.denials)


def test_a_message_that_is_too_long_is_refused_on_both_sides(world: World) -> None:
    """Before it is read, and before it is sent."""
    with world.serving():
        assert b"at most 1048576 bytes" in world.raw((MAX_BYTES + 1).to_bytes(4, "big") + b"x")
        client = world.client()
        with pytest.raises(InvalidRequest, match="at most 1048576 bytes"):
            client.unwrap(NAME, "x" * MAX_BYTES)
        assert client.info(NAME) == INFO


def test_a_slow_caller_is_cut_off_and_holds_nobody_up(world: World) -> None:
    """A message that drips in is given up; others are answered meanwhile."""
    with world.serving(read_s=0.3), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as slow:
        slow.connect(str(world.path))
        slow.settimeout(10)
        slow.sendall(b"\0\0")
        assert world.client().info(NAME) == INFO
        assert slow.recv(1) == b""


def test_a_client_survives_a_restart_of_its_broker(world: World) -> None:
    """One connection lost in between is made again; the caller sees nothing."""
    client = world.client()
    with world.serving():
        text = client.wrap(NAME, SECRET)
    with pytest.raises(KeyStoreUnavailable, match=str(world.path)):
        client.info(NAME)
    with world.serving():
        assert client.unwrap(NAME, text) == SECRET
    with world.serving():
        assert client.unwrap(NAME, text) == SECRET
        assert client.rotate(NAME) == 2


def test_a_token_is_not_shown_to_another_users_listener(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have bound the path first; root's broker is everybody's."""
    with world.serving():
        monkeypatch.setattr(client_module, "peer_uid", lambda connection: 4242)
        monkeypatch.setattr(client_module.os, "geteuid", lambda: 1000)
        heard = world.ring.names()
        with pytest.raises(KeyStoreUnavailable, match="belongs to user 4242"):
            world.client().names()
        monkeypatch.setattr(client_module, "peer_uid", lambda connection: 0)
        assert world.client().names() == heard


def test_without_a_broker_the_error_names_the_socket_and_the_remedy(world: World) -> None:
    """Exit code 1: nothing is wrong with the request."""
    with pytest.raises(KeyStoreUnavailable, match=rf"{world.path}.*cluster\.up"):
        world.client().names()


def test_stopping_answers_what_is_under_way(world: World) -> None:
    """A request that the store is still working on gets its answer; the socket is gone afterwards."""
    entered, release = threading.Event(), threading.Event()

    class Slow(Failing):
        def info(self, name: str) -> KeyInfo:
            entered.set()
            assert release.wait(10)
            return INFO

    got: list[KeyInfo] = []
    idle = world.client()
    with world.serving(Slow(RuntimeError())) as stopped:
        caller = threading.Thread(target=lambda: got.append(world.client().info(NAME)))
        caller.start()
        assert entered.wait(10)
        stopped.set()
        until(lambda: not world.path.exists())
        release.set()
        caller.join()
    assert got == [INFO]
    idle.close()


def test_the_socket_and_its_folder_are_private(world: World) -> None:
    """0600 in 0700; a folder that others can enter is refused."""
    with world.serving():
        assert world.path.stat().st_mode & 0o777 == 0o600
        assert world.path.parent.stat().st_mode & 0o777 == 0o700
    world.path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        run_once(world)


def run_once(world: World) -> None:
    """A broker that stops at once."""
    stopped = threading.Event()
    stopped.set()
    Broker(world.ring, world.path, verify=verify, decide=decide, audit=world.denials.append).run(stopped)


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(world: World) -> None:
    """Neither one with a broker, nor one with a stranger, nor a file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.bind(str(world.path))
        stranger.listen()
        with pytest.raises(ConfigError, match="listens at"):
            run_once(world)
    assert world.path.is_socket()
    with world.serving():
        until(lambda: answers(world.path))
        with pytest.raises(ConfigError, match="listens at"):
            run_once(world)
        assert world.client().info(NAME) == INFO
    world.path.write_text("mine")
    with pytest.raises(ConfigError, match="is not a socket"):
        run_once(world)
    assert world.path.read_text() == "mine"


def test_a_path_that_no_socket_can_have_is_refused(world: World) -> None:
    """On both sides, with its length."""
    long = world.path.with_name("x" * 98)
    with pytest.raises(ConfigError, match="ends at 97"):
        BrokerKeyStore(long, lambda: "token")
    with pytest.raises(ConfigError, match="ends at 97"):
        Broker(world.ring, long, verify=verify, decide=decide, audit=world.denials.append)


def test_only_the_same_user_and_root_may_connect() -> None:
    """By the kernel's word, whatever the socket's mode."""
    assert [peer_allowed(uid, own=1000) for uid in (1000, 0, 1001, 65534)] == [True, True, False, False]
    assert [peer_allowed(uid, own=0) for uid in (0, 1000)] == [True, False]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away_though_the_socket_lets_it_in(world: World) -> None:
    """The denial is on record with the user's number."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
        "print(s.recv(9999)[4:].decode())"
    )
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no python3 that every user may run")
    with world.serving():
        world.path.parent.chmod(0o711)
        world.path.chmod(0o666)
        done = subprocess.run(
            [python, "-c", code, str(world.path)],
            user=65534,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            cwd="/",
        )
        world.path.parent.chmod(0o700)
    assert json.loads(done.stdout)["error"] == "AccessDenied"
    assert world.denials == [
        Denial(principal=None, operation="connect", name="", reason="it comes from user 65534")
    ]


def test_a_forked_child_makes_its_own_connection(world: World) -> None:
    """Answers of parent and child never cross."""
    client = world.client()
    with world.serving(), ExitStack() as stack:
        texts = [client.wrap(NAME, bytes([number]) * 32) for number in range(20)]
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            stack.callback(pool.terminate)
            opened = pool.starmap(client_unwrap, [(world.path, text) for text in texts])
        assert opened == [client.unwrap(NAME, text) for text in texts]


def client_unwrap(path: Path, text: str) -> bytes:
    """Unwrap in a child."""
    return BrokerKeyStore(path, lambda: "admin/x").unwrap(NAME, text)


def test_many_callers_are_served_at_once(world: World) -> None:
    """Every one gets its own secrets back."""
    wrong: list[object] = []

    def work(number: int, client: BrokerKeyStore) -> None:
        for turn in range(20):
            secret = bytes([number, turn]) * 16
            if client.unwrap(NAME, client.wrap(NAME, secret)) != secret:
                wrong.append((number, turn))

    with world.serving():
        shared = world.client()
        threads = [
            threading.Thread(target=work, args=(number, shared if number % 2 else world.client()))
            for number in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_the_broker_needs_no_ray() -> None:
    """It starts before the cluster and outlives it."""
    code = (
        "import sys, cluster.security.keys.broker, cluster.security.keys.client, cluster.security.keys.keyring; "
        "print([m for m in ('ray', 'hvac', 'hydra', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
