"""Tests of the ledger: the hash chain, its events, checkpoints, concurrent writers, and the command."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError, LedgerCorrupt, ReleaseTooOld
from cluster.ledger import Ledger, open_ledger
from cluster.ledger import __main__ as ledger_command
from cluster.ledger.chain import GENESIS, Entry, build_entry, read_lines, to_json, verify_chain
from cluster.ledger.checkpoint import (
    PRIVATE_NAME,
    PUBLIC_NAME,
    ensure_signer,
    load_public_key,
    load_signer,
    verify_signatures,
)
from cluster.ledger.events import (
    AccessDecided,
    AliasMoved,
    CheckpointSigned,
    ClusterStopped,
    JobStarted,
    LedgerEvent,
    Subject,
    UnknownEvent,
    parse,
)
from cluster.registry import Registry
from cluster.security.tokens.issuer import ensure_issuer, mint_token, write_private_file
from cluster.security.tokens.roles import Role
from cluster.settings import LedgerConfig, PlatformConfig, Tier
from cluster.storage import Layout
from serve_apps.edge.control.own_limits import read_own_limits
from serve_apps.rollout.serving_state import read_states
from tests.processes import forks
from tests.processes.commands import run_main

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
PAYLOADS = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), JSON, max_size=3)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


def fill(ledger: Ledger, number: int) -> None:
    """Append a number of events."""
    for count in range(number):
        ledger.append(ClusterStopped(cluster_id=str(count)), actor="user:a")


def signed(tmp_path: Path) -> tuple[Ledger, Ed25519PublicKey]:
    """Return a ledger with a checkpoint every two events, and the key that verifies them."""
    signer = ensure_signer(tmp_path / "keys")
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db", signer=signer, checkpoint_every=2)
    return ledger, load_public_key(tmp_path / "keys" / PUBLIC_NAME)


def chain(payloads: list[dict[str, Any]]) -> list[Entry]:
    entries: list[Entry] = []
    for seq, payload in enumerate(payloads, start=1):
        prev_hash = entries[-1].hash if entries else GENESIS
        fixed = {"time": "2026-01-01T00:00:00.000000+00:00", "type": "T", "actor": "a"}
        entries.append(build_entry(seq=seq, payload=to_json(payload), prev_hash=prev_hash, **fixed))
    return entries


@given(st.lists(PAYLOADS, max_size=5))
def test_an_export_reads_back_and_verifies(payloads: list[dict[str, Any]]) -> None:
    """An export of any JSON payloads can be read back and verified."""
    entries = chain(payloads)
    assert list(verify_chain(read_lines(entry.line() for entry in entries))) == entries


@given(st.lists(PAYLOADS, min_size=2, max_size=6), st.data())
def test_change_of_one_field_is_reported_with_its_seq(
    payloads: list[dict[str, Any]], data: st.DataObject
) -> None:
    entries = chain(payloads)
    position = data.draw(st.integers(0, len(entries) - 1))
    name, value = data.draw(
        st.sampled_from([("actor", "mallory"), ("type", "U"), ("payload", {"z": 1}), ("time", "x")])
    )
    entries[position] = dataclasses.replace(entries[position], **{name: value})
    with pytest.raises(LedgerCorrupt) as caught:
        list(verify_chain(entries))
    assert caught.value.seq == position + 1


@given(st.lists(PAYLOADS, min_size=2, max_size=6), st.data())
def test_removed_entry_is_reported(payloads: list[dict[str, Any]], data: st.DataObject) -> None:
    entries = chain(payloads)
    position = data.draw(st.integers(0, len(entries) - 2))
    del entries[position]
    with pytest.raises(LedgerCorrupt) as caught:
        list(verify_chain(entries))
    assert caught.value.seq == position + 1


def test_large_integers_become_strings_and_nan_null() -> None:
    """Other JSON readers would round these numbers or refuse them."""
    written = to_json({"n": 2**53 + 1, "m": 2**53 - 1, "x": float("nan"), "f": 2.0**60})
    assert written == {"n": str(2**53 + 1), "m": 2**53 - 1, "x": None, "f": str(2**60)}


def test_events_are_read_back_after_reopening(tmp_path: Path) -> None:
    """Events can be read by type and after a seq."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    moved = AliasMoved(name="m", alias="champion", version=2, previous=1, reason="test")
    ledger = Ledger(url)
    ledger.append(ClusterStopped(cluster_id="c"), actor="user:a")
    ledger.append(moved, actor="user:b")
    ledger.close()
    reopened = Ledger(url)
    assert [entry.event() for entry in reopened.entries(AliasMoved)] == [moved]
    assert [entry.seq for entry in reopened.entries(after=1)] == [2]
    assert reopened.head() == 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _NewerEvent:
    """An event of a newer release. It is not a `LedgerEvent`, so this release does not know it."""

    type: str
    content: dict[str, Any]

    def payload(self) -> dict[str, Any]:
        return self.content


def _append_newer(ledger: Ledger, type_name: str, **content: Any) -> Entry:
    return ledger.append(cast("LedgerEvent", _NewerEvent(type=type_name, content=content)), actor="user:new")


def test_unknown_event_is_stored_verified_and_ignored_by_readers(tmp_path: Path, ledger: Ledger) -> None:
    """Its content is kept, the chain covers it, and readers continue after it."""
    _append_newer(ledger, "ConsoleOpened", run="r1")
    moved = AliasMoved(name="m", alias="champion", version=2, previous=1, reason="test")
    ledger.append(moved, actor="user:b")
    unknown, known = [entry.event() for entry in verify_chain(ledger.entries())]
    assert unknown == UnknownEvent(stored_type="ConsoleOpened", content={"run": "r1"})
    assert (unknown.type, unknown.payload()) == ("ConsoleOpened", {"run": "r1"})
    assert known == moved
    assert read_states(ledger)["m"].champion_version == 2
    assert read_own_limits(ledger).set == {}
    assert Registry(ledger, Layout(str(tmp_path))).aliases("m") == {"champion": 2}
    for subject in Subject:
        ledger.require_known(subject)


def test_unknown_field_is_dropped_unless_event_has_a_subject() -> None:
    """With an unknown field, an event that changes serving, a key or a limit becomes an `UnknownEvent`."""
    assert parse("ClusterStopped", {"cluster_id": "c", "why": "x"}, seq=1) == ClusterStopped(cluster_id="c")
    limit = {"limited": "tenant", "name": "t", "burst": 9}
    assert parse("EdgeLimitSet", limit, seq=1) == UnknownEvent(stored_type="EdgeLimitSet", content=limit)
    with pytest.raises(LedgerCorrupt, match="Event 7 is not a valid ClusterStopped"):
        parse("ClusterStopped", {}, seq=7)


@pytest.mark.parametrize(
    ("type_name", "subject", "reader"),
    [
        ("RolloutPaused", Subject.serving, read_states),
        ("EdgeLimitsDropped", Subject.limit, read_own_limits),
        ("KeyHeld", Subject.key, None),
    ],
)
def test_unknown_event_stops_readers_of_its_subject(
    ledger: Ledger, type_name: str, subject: Subject, reader: Callable[[Ledger], object] | None
) -> None:
    """Other subjects are not affected."""
    _append_newer(ledger, type_name)
    for candidate in Subject:
        if candidate is not subject:
            ledger.require_known(candidate)
    with pytest.raises(ReleaseTooOld, match=type_name):
        ledger.require_known(subject)
    if reader is not None:
        with pytest.raises(ReleaseTooOld, match="Update this installation"):
            reader(ledger)


def _append_many(url: str, writer: int) -> None:
    ledger = Ledger(url)
    for number in range(25):
        ledger.append(ClusterStopped(cluster_id=f"{writer}-{number}"), actor=f"user:{writer}")


def test_concurrent_writers_never_fork_or_lose_an_event(tmp_path: Path) -> None:
    """Four processes append 25 events each, and the result is one chain of 100 events."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    context = forks.context()
    writers = [context.Process(target=_append_many, args=(url, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    entries = list(verify_chain(Ledger(url).entries()))
    assert len(entries) == 100
    assert len({entry.payload["cluster_id"] for entry in entries}) == 100


def _start_jobs(url: str) -> None:
    ledger = Ledger(url)
    for number in range(25):
        ledger.append_once(JobStarted(job=f"{number}"), actor="t", job=f"{number}")


def test_concurrent_writers_append_each_event_once(tmp_path: Path) -> None:
    """Four processes append the same 25 events. A later try returns None."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    writers = [forks.context().Process(target=_start_jobs, args=(url,)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [entry.payload["job"] for entry in Ledger(url).entries()] == [f"{number}" for number in range(25)]
    assert Ledger(url).append_once(JobStarted(job="0"), actor="t", job="0") is None


def test_checkpoints_are_signed_every_n_events(tmp_path: Path) -> None:
    """An auditor with the public key accepts the chain and its checkpoints."""
    ledger, key = signed(tmp_path)
    fill(ledger, 5)
    entries = list(verify_signatures(verify_chain(ledger.entries()), key))
    assert any(entry.type == CheckpointSigned.__name__ for entry in entries)
    assert (tmp_path / "keys" / "ledger.pem").stat().st_mode & 0o077 == 0


def test_checkpoint_that_a_process_without_the_key_left_out_is_made_up_for(tmp_path: Path) -> None:
    """Other nodes write to the ledger without the signing key."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    signer = ensure_signer(tmp_path / "keys")
    with_key, without_key = Ledger(url, signer=signer, checkpoint_every=5), Ledger(url, checkpoint_every=5)
    fill(with_key, 4)
    fill(without_key, 3)
    assert with_key.last(CheckpointSigned) is None
    fill(with_key, 1)
    signed_at = with_key.last(CheckpointSigned)
    assert signed_at is not None
    assert signed_at.seq == 9
    fill(with_key, 1)
    fill(with_key, 1)
    assert [entry.seq for entry in with_key.entries(CheckpointSigned)] == [9, 11]


@pytest.mark.parametrize("kind", ["damaged", "empty", "under a password", "another algorithm"])
def test_a_signing_key_that_cannot_be_used_is_refused(tmp_path: Path, kind: str) -> None:
    """The message names the file and says what to do."""
    ensure_signer(tmp_path)
    path = tmp_path / PRIVATE_NAME
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    password, none = serialization.BestAvailableEncryption(b"secret"), serialization.NoEncryption()
    content = {
        "damaged": path.read_bytes()[:60],
        "empty": b"",
        "under a password": Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, password),
        "another algorithm": ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, pkcs8, none),
    }
    path.write_bytes(content[kind])
    for load in (load_signer, ensure_signer):
        with pytest.raises(ConfigError, match=f"{path} holds no Ed25519 private key. Restore"):
            load(tmp_path)
    assert load_signer(tmp_path / "elsewhere") is None


def test_a_rewritten_chain_fails_against_the_public_key(tmp_path: Path) -> None:
    """An attacker who recomputes every hash still lacks the signing key."""
    ledger, key = signed(tmp_path)
    fill(ledger, 4)
    forged: list[Entry] = []
    for entry in ledger.entries():
        fields = dataclasses.asdict(entry) | {"prev_hash": forged[-1].hash if forged else GENESIS}
        del fields["hash"]
        if entry.seq == 1:
            fields["payload"] = {"cluster_id": "forged"}
        forged.append(build_entry(**fields))
    assert len(list(verify_chain(forged))) == len(forged)
    with pytest.raises(LedgerCorrupt, match="Checkpoint"):
        list(verify_signatures(verify_chain(forged), key))


def test_the_command_exports_and_verifies(tmp_path: Path, ledger: Ledger) -> None:
    """`verify` of a changed export exits with 2 and names the first bad event."""
    fill(ledger, 3)
    export = tmp_path / "export.jsonl"
    exported = run_main(ledger_command.main, "--root", str(tmp_path), "export", "--output", str(export))
    assert exported.returncode == 0
    assert run_main(ledger_command.main, "verify", "--file", str(export)).returncode == 0
    lines = export.read_text().splitlines()
    lines[1] = lines[1].replace('"cluster_id":"1"', '"cluster_id":"9"')
    export.write_text("\n".join(lines) + "\n")
    broken = run_main(ledger_command.main, "verify", "--file", str(export))
    assert broken.returncode == 2
    assert "Event 2 was changed" in broken.stderr


@pytest.mark.parametrize(("role", "code"), [(Role.auditor, 0), (Role.data_scientist, 2)])
def test_export_requires_a_role_that_may_read_the_ledger(tmp_path: Path, role: Role, code: int) -> None:
    """A refusal has exit code 2 and is recorded as an event."""
    places = Layout(str(tmp_path))
    ensure_issuer(places)
    ledger = Ledger(f"sqlite:///{places.ledger_path}")
    ledger.append(ClusterStopped(cluster_id="1"), actor="user:a")
    token = tmp_path / "reader.jwt"
    write_private_file(token, mint_token(places, subject="ann", role=role, purpose="").encode())
    result = run_main(ledger_command.main, "--root", str(tmp_path), "--token", str(token), "export")
    assert result.returncode == code, result.stderr
    assert ("ClusterStopped" in result.stdout) == (code == 0)
    denied = [entry.actor for entry in ledger.entries(AccessDecided) if not entry.payload["allowed"]]
    assert denied == ["ann"] * (code == 2)


@pytest.mark.parametrize(
    ("num_events", "with_key", "message"),
    [
        (4, True, r"verified \d+ events; signed checkpoints cover events 1 to [2-9]\n"),
        (1, True, "verified 1 events: hash chain only; they contain no signed checkpoint\n"),
        (4, False, r"verified \d+ events: hash chain only; --public-key also verifies .*\n"),
    ],
)
def test_verify_says_which_events_are_signed(
    tmp_path: Path, num_events: int, with_key: bool, message: str
) -> None:
    """Anyone can write a new hash chain, so an export without a signed checkpoint proves nothing about its author."""
    ledger, _ = signed(tmp_path)
    fill(ledger, num_events)
    key = ["--public-key", str(tmp_path / "keys" / PUBLIC_NAME)] if with_key else []
    result = run_main(ledger_command.main, "--root", str(tmp_path), "verify", *key)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(message, result.stdout)


@pytest.mark.parametrize("options", ["", "?sslmode=require", "?sslmode=verify-ca"])
def test_enterprise_tier_requires_verified_tls_to_the_database(options: str) -> None:
    """A URL without `sslmode=verify-full` is refused."""
    url = f"postgresql+psycopg://falaj@db.example/ledger{options}"
    config = PlatformConfig(tier=Tier.enterprise_gpu, ledger=LedgerConfig(url=url))
    with pytest.raises(ConfigError, match=r"db\.example.*verify-full"):
        open_ledger(config)


def test_verify_reads_the_database_without_a_file(tmp_path: Path, ledger: Ledger) -> None:
    """A change of a row in the database is reported."""
    fill(ledger, 3)
    with ledger.writing() as connection:
        connection.execute(sa.text("UPDATE events SET actor = 'mallory' WHERE seq = 3"))
    result = run_main(ledger_command.main, "--root", str(tmp_path), "verify")
    assert result.returncode == 2
    assert "Event 3" in result.stderr
