"""Tests of the head's decision about a machine that asks to join."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import pytest
from cryptography import x509

from cluster.errors import ConfigError, FalajError, InvalidRequest, Unauthenticated
from cluster.ledger.events import NodeJoined, NodeLeft
from cluster.membership import join_token
from cluster.membership.admission import fingerprint
from cluster.membership.head_client import HeadClient, first_request
from cluster.membership.members import current_members
from cluster.membership.service import SILENT_S
from cluster.membership.shared_state import require_shared_state
from cluster.membership.transport import client_context, node_context
from cluster.security.tls.certificates import ensure_tls, write_node_certificate
from cluster.settings import LedgerConfig, OnlineConfig, OnlineKind, PlatformConfig, StorageConfig
from cluster.storage import Layout
from tests.servers.ports import free_port
from tests.unit.cluster.membership.conftest import NODE_ADDRESS, Head


def test_node_gets_a_certificate_and_the_shared_secrets(head: Head) -> None:
    """Its key stays with it, and so do the private keys of the head with the head. The ledger has the event."""
    _, application = head.application()
    answer = head.ask(application)
    certificate = x509.load_pem_x509_certificate(str(answer["certificate"]).encode())
    addresses = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert NODE_ADDRESS in [str(address) for address in addresses.get_values_for_type(x509.IPAddress)]
    assert addresses.get_values_for_type(x509.DNSName) == ["localhost"]
    assert certificate.subject.rfc4514_string() == "CN=falaj-node-node-2"
    assert set(answer["files"]) == {"ray_token", "issuer.pub.pem", "jwks.json"}  # type: ignore[call-overload]
    assert answer["overrides"] == head.record.overrides
    [entry] = head.ledger.entries(NodeJoined)
    assert entry.payload["certificate"] == fingerprint(str(answer["certificate"]).encode())
    assert "PRIVATE" not in str(answer)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token": "falaj-join.9999999999.00.x"}, Unauthenticated, "join token is wrong"),
        ({"token": ""}, Unauthenticated, "join token is wrong"),
        ({"release": "falaj 0.0.9, code abc"}, ConfigError, r"another release.*falaj 0\.0\.9.*Head: falaj"),
        ({"address": "127.0.0.3"}, ConfigError, "not the address that the head sees"),
        ({"name": "a b"}, InvalidRequest, "name has letters"),
        ({"name": "10.0.0.1"}, InvalidRequest, "is not an address"),
        ({"name": "HEAD"}, ConfigError, "is named 'HEAD'.*name=…"),
        ({"region": "eu/1"}, InvalidRequest, r"Set cluster\.region"),
        ({"region": "e" * 64}, InvalidRequest, "at most 63"),
        ({"num_cpus": "2"}, InvalidRequest, "needs 'num_cpus'"),
        ({"signing_request": "x"}, InvalidRequest, "damaged"),
    ],
)
def test_refused_machine_changes_nothing(
    head: Head, changes: dict[str, object], error: type[FalajError], message: str
) -> None:
    """The message says what to do, and the ledger has no event."""
    _, application = head.application(**changes)
    with pytest.raises(error, match=message):
        head.ask(application)
    assert not list(head.ledger.entries(NodeJoined))


def test_expired_token_is_refused(head: Head) -> None:
    """Its lifetime is part of the token, so nobody can extend it."""
    places = head.record.layout
    _, application = head.application(token=join_token.mint(places, ttl_s=10, now=1_000_000_000).text)
    with pytest.raises(Unauthenticated, match="has expired"):
        head.ask(application)
    text = application.token
    _, expiry, *rest = text.split(".")
    with pytest.raises(Unauthenticated, match="is wrong"):
        join_token.check(places, ".".join(["falaj-join", str(int(expiry) + 10**9), *rest]))


def test_second_node_at_the_address_of_a_live_one_is_refused(head: Head) -> None:
    """A dead one is replaced: the machine lost its disk, for example."""
    first, client = head.join()
    client.request("report", parts={})
    with pytest.raises(ConfigError, match="is alive"):
        head.join()
    head.service.clock = lambda: time.monotonic() + SILENT_S
    second, _ = head.join()
    assert list(current_members(head.ledger, "abc")) == [second]
    [left] = head.ledger.entries(NodeLeft)
    assert (left.payload["node_id"], left.payload["reason"]) == (first, "replaced")


@pytest.mark.parametrize(("edge", "names"), [(False, ["localhost"]), (True, ["api.example", "localhost"])])
def test_only_a_node_with_an_edge_gets_the_names_of_edges(head: Head, edge: bool, names: list[str]) -> None:
    """The certificate of another node is not valid for them."""
    head.config.cluster.edge_names = ["api.example"]
    _, application = head.application(edge=edge)
    certificate = x509.load_pem_x509_certificate(str(head.ask(application)["certificate"]).encode())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == names


def test_a_node_cannot_take_the_name_or_id_of_another_one(head: Head) -> None:
    """Otherwise an operator could remove the wrong node."""
    node_id, _ = head.join()
    for name in ("NODE-2", node_id):
        _, application = head.application(name=name, address="127.0.0.3")
        with pytest.raises(ConfigError, match="Another node of the cluster is named"):
            head.ask(application, own_address="127.0.0.3")


def test_nothing_is_sent_to_a_head_of_another_authority(head: Head, tmp_path: Path) -> None:
    """So a join token cannot be stolen by a machine that takes the head's address."""
    ensure_tls(Layout(str(tmp_path / "other")))
    other = (tmp_path / "other" / "tls" / "ca.pem").read_text()
    _, application = head.application()
    message = {"op": "join", **asdict(application)}
    with pytest.raises(ConfigError, match="not one of this cluster's head"):
        first_request(head.url, client_context(authority=other), message, own_address=NODE_ADDRESS)


def test_address_where_nothing_listens_is_named(head: Head) -> None:
    """The message has the reason of the operating system."""
    _, application = head.application()
    context = client_context(authority=join_token.mint(head.record.layout).authority)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"No head answers at {address} .*refused"):
        first_request(address, context, {"op": "join", **asdict(application)}, own_address=NODE_ADDRESS)


def test_with_a_companys_authority_the_machine_shows_its_own_certificate(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head cannot sign, and says what the machine needs. With it, the shown certificate becomes the node's."""
    monkeypatch.setattr("cluster.membership.admission.is_foreign_authority", lambda authority: True)
    _, application = head.application(signing_request="")
    with pytest.raises(ConfigError, match=r"come from another authority.*node\.key"):
        head.ask(application)
    tls = tmp_path / "companys"
    authority = Path(head.record.layout.tls)
    write_node_certificate(tls, authority=authority, name="node-2", addresses=[NODE_ADDRESS])
    answer = first_request(
        head.url,
        node_context(tls),
        {"op": "join", **asdict(application)},
        own_address=NODE_ADDRESS,
    )
    assert answer["certificate"] is None
    [member] = current_members(head.ledger, "abc").values()
    assert member.certificate == fingerprint((tls / "node.pem").read_bytes())
    assert HeadClient(head.url, tls=tls, address=NODE_ADDRESS).request("nodes")


SHARED = {
    "ledger": LedgerConfig(url="postgresql+psycopg://falaj@10.0.0.9/ledger"),
    "storage": StorageConfig(root="s3://bucket/falaj"),
    "online": OnlineConfig(kind=OnlineKind.redis, url="redis://10.0.0.9:6379/0"),
}


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("ledger", LedgerConfig(), "the ledger is SQLite"),
        ("ledger", LedgerConfig(url="postgresql+psycopg://falaj@127.0.0.1/l"), "ledger.url names 127.0.0.1"),
        ("ledger", LedgerConfig(url="postgresql+psycopg:///ledger"), "ledger.url names localhost"),
        ("storage", StorageConfig(), "storage.root is a folder of the head"),
        ("online", OnlineConfig(), "the online store is LMDB"),
        ("online", OnlineConfig(kind=OnlineKind.redis), "online.url names 127.0.0.1"),
    ],
)
def test_state_on_one_machine_is_refused(section: str, value: object, message: str) -> None:
    """The message says which setting to change, and that the head must start with it."""
    require_shared_state(PlatformConfig(**SHARED))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{message}.*cluster.up"):
        require_shared_state(PlatformConfig(**{**SHARED, section: value}))  # type: ignore[arg-type]


def test_all_state_on_one_machine_is_named_at_once() -> None:
    """Each change needs a new start of the head."""
    with pytest.raises(ConfigError) as refusal:
        require_shared_state(PlatformConfig())
    assert str(refusal.value) == (
        "A second node cannot join, because the ledger is SQLite, and storage.root is a folder of the head, and the "
        "online store is LMDB. Run `python -m cluster.down` on the head, then `python -m cluster.up` with "
        "ledger.url=postgresql+psycopg://…, storage=s3 storage.root=s3://…, online=redis online.url=…."
    )


def test_token_file_is_private_and_masked(head: Head, tmp_path: Path) -> None:
    """Other users must not read it, and no message shows it."""
    token = join_token.mint(head.record.layout)
    path = tmp_path / "node.join"
    join_token.write(token, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert join_token.read(path) == token
    assert token.text not in repr(token)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        join_token.read(path)
    path.write_text("x")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="has no join token"):
        join_token.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        join_token.read(tmp_path / "missing")
