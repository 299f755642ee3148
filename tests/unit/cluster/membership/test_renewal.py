"""Tests of new certificates for running nodes, with lifetimes of seconds."""

from __future__ import annotations

import datetime as dt
import functools
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from cluster.errors import ConfigError, Unauthenticated
from cluster.ledger.events import NodeCertificateRenewed
from cluster.membership import renewal
from cluster.membership.admission import fingerprint, new_key_and_request, signing_request
from cluster.membership.head_client import HeadClient
from cluster.membership.members import current_members
from cluster.membership.renewal import renew_from_head
from cluster.membership.transport import Peer
from cluster.security.keys.store import KeyStoreUnavailable
from cluster.security.tls import certificates
from cluster.storage import local
from cluster.supervisor.machine import ThisMachine
from cluster.supervisor.renewal import Renewal
from tests.servers.polling import wait_until
from tests.unit.cluster.membership.conftest import NODE_ADDRESS, Head

LIFETIME_S = 6.0


@pytest.fixture
def short_lived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new certificates live for some seconds."""
    monkeypatch.setattr(certificates, "LEAF_DAYS", LIFETIME_S / 86_400)
    monkeypatch.setattr(certificates, "CLOCK_SKEW", dt.timedelta(seconds=1))


@pytest.fixture
def head_for_years(head: Head) -> Head:
    """A head whose own certificate does not expire, because it was made before `short_lived`."""
    return head


def test_node_renews_its_certificate_while_it_works(head_for_years: Head, short_lived: None) -> None:
    """Requests go on over three lifetimes, new connections and old ones, and none fails. Each renewal is an event.

    The key stays, and so do the names and the address. An earlier certificate is accepted until it expires.
    """
    head = head_for_years
    node_id, client = head.join()
    first = (client._tls / "node.pem").read_bytes()
    key = (client._tls / "node.key").read_bytes()
    stopped = threading.Event()
    renewing = Renewal(lambda: renew_from_head(client._tls, client), stopped=stopped, every_s=0.2)
    renewing.start()
    try:
        ends, fresh = time.monotonic() + 2.5 * LIFETIME_S, 0
        while time.monotonic() < ends:
            assert client.request("nodes") is not None
            assert HeadClient(head.url, tls=client._tls, address=NODE_ADDRESS).request("nodes") is not None
            fresh += 1
            time.sleep(0.1)
    finally:
        stopped.set()
        renewing.join(10)
    assert fresh > 50
    assert (client._tls / "node.key").read_bytes() == key
    newest = (client._tls / "node.pem").read_bytes()
    assert (client._tls / "edge.pem").read_bytes() == newest + key
    one, other = map(x509.load_pem_x509_certificate, (first, newest))
    assert certificates.alternative_names(one) == certificates.alternative_names(other)
    assert one.subject == other.subject
    events = [entry.payload for entry in head.ledger.entries(NodeCertificateRenewed)]
    assert 2 <= len(events) <= 6
    assert {event["node_id"] for event in events} == {node_id}
    assert events[-1]["certificate"] == fingerprint(newest)
    member = current_members(head.ledger, "abc")[node_id]
    assert member.certificate == fingerprint(newest)
    assert member.earlier[0] == fingerprint(first)


def test_node_that_did_not_renew_in_time_is_told_to_join_again(
    head_for_years: Head, short_lived: None
) -> None:
    """The head refuses the expired certificate in the handshake, and the node's own commands say what to do."""
    head = head_for_years
    _, client = head.join()
    certificate = x509.load_pem_x509_certificate((client._tls / "node.pem").read_bytes())
    wait_until(
        lambda: dt.datetime.now(dt.UTC) > certificate.not_valid_after_utc + dt.timedelta(seconds=1),
        seconds=3 * LIFETIME_S,
    )
    with pytest.raises(ConfigError, match=r"expired on .*cluster\.leave`, then join again"):
        renew_from_head(client._tls, client)
    # If the connection ends before the client reads the alert, OpenSSL reports the end of the file.
    with pytest.raises(ssl.SSLError, match=r"certificate expired|EOF occurred"):
        _first_byte_of_answer(head, client._tls)


def test_lost_answer_locks_no_node_out(
    head_for_years: Head, short_lived: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head has recorded the new certificate, and the node never got it. The old one still opens the service.

    The node gets another one, but not at once: if it could not write it, it would ask each minute.
    """
    head = head_for_years
    node_id, client = head.join()
    wait_until(lambda: _is_due(client._tls), seconds=3 * LIFETIME_S)
    renew = functools.partial(client.request, "renew", signing_request=_own_request(client._tls))
    renew()  # the answer is lost
    monkeypatch.setattr(renewal, "PAUSE_SHARE", 1.0)
    with pytest.raises(ConfigError, match="renewed the certificate of node"):  # or the ledger would fill
        renew()
    monkeypatch.setattr(renewal, "PAUSE_SHARE", 0.0)
    assert client.request("report", parts={}) is not None
    assert renew_from_head(client._tls, client)
    assert client.request("report", parts={}) is not None
    assert len(list(head.ledger.entries(NodeCertificateRenewed))) == 2
    client.request("leave", reason="left")
    with pytest.raises(Unauthenticated, match="it has left"):
        client.request("nodes")
    assert node_id not in current_members(head.ledger, "abc")


def test_certificate_is_renewed_for_its_node_only(head: Head) -> None:
    """Not before half of its lifetime, not from another address, and not for the head itself."""
    _, client = head.join()
    request = new_key_and_request("x")[1]
    with pytest.raises(ConfigError, match="second half of its lifetime"):
        client.request("renew", signing_request=request)
    assert not renew_from_head(client._tls, client)
    shown = (client._tls / "node.pem").read_bytes()
    der = x509.load_pem_x509_certificate(shown).public_bytes(certificates.serialization.Encoding.DER)
    peer = Peer(address="127.0.0.9", shown=der)
    answer = head.service.answer({"op": "renew", "signing_request": request}, peer)
    assert answer["error"] == Unauthenticated.__name__
    own = HeadClient.of(head.record)
    with pytest.raises(ConfigError, match="another authority"):
        own.request("renew", signing_request=request)
    assert not list(head.ledger.entries(NodeCertificateRenewed))


def test_certificate_is_renewed_for_the_same_key_only(head_for_years: Head, short_lived: None) -> None:
    """A thief of a node's certificate and key gets no certificate for another key."""
    head = head_for_years
    _, client = head.join()
    wait_until(lambda: _is_due(client._tls), seconds=3 * LIFETIME_S)
    with pytest.raises(Unauthenticated, match="own key only"):
        client.request("renew", signing_request=new_key_and_request("x")[1])
    assert not list(head.ledger.entries(NodeCertificateRenewed))


def test_edge_of_a_node_keeps_its_names(
    head: Head, monkeypatch: pytest.MonkeyPatch, short_lived: None
) -> None:
    """A node with an edge joined with the names of the cluster's edges."""
    cluster = replace(head.config.cluster, edge_names=["api.example.com"])
    head.service.config = replace(head.config, cluster=cluster)
    monkeypatch.setattr(Head, "application", _with_edge(Head.application))
    _, client = head.join()
    wait_until(lambda: _is_due(client._tls), seconds=3 * LIFETIME_S)
    assert renew_from_head(client._tls, client)
    assert "api.example.com" in certificates.certificate_names(client._tls / "edge.pem")


def test_head_renews_its_own_certificates(head: Head, short_lived: None) -> None:
    """The service for nodes uses the new one for its next connection. The key of the node's certificate stays."""
    tls = local(head.record.layout.tls)
    certificates.ensure_tls(head.record.layout, renew=True)
    key, before = (
        (tls / "node.key").read_bytes(),
        [(tls / name).read_bytes() for name in ("node.pem", "edge.pem")],
    )
    machine = ThisMachine(head.config, head.record)
    assert not machine.renew_certificates()
    (tls / "ca.key").rename(tls / "elsewhere")
    with pytest.raises(ConfigError, match=r"lacks ca\.key of the authority"):  # no new authority
        machine.renew_certificates()
    (tls / "elsewhere").rename(tls / "ca.key")
    assert before == [(tls / name).read_bytes() for name in ("node.pem", "edge.pem")]
    wait_until(lambda: _is_due(tls), seconds=3 * LIFETIME_S)
    assert machine.renew_certificates()
    after = [(tls / name).read_bytes() for name in ("node.pem", "edge.pem")]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert (tls / "node.key").read_bytes() == key
    context = ssl.create_default_context(cafile=str(tls / "ca.pem"))
    host, port = head.url.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        shown = secured.getpeercert(binary_form=True)
    assert shown is not None
    assert x509.load_der_x509_certificate(shown) == x509.load_pem_x509_certificate(after[0])
    [event] = [entry.payload for entry in head.ledger.entries(NodeCertificateRenewed)]
    assert (event["node_id"], event["certificate"]) == ("head", fingerprint(after[0]))


def test_failed_renewal_is_tried_again_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The head may be down for a while: a third of the lifetime is left."""
    tries, stopped = [], threading.Event()

    def renew() -> bool:
        tries.append(1)
        if len(tries) < 4:
            raise KeyStoreUnavailable("the head does not answer")
        stopped.set()
        return True

    renewing = Renewal(renew, stopped=stopped, every_s=0.01)
    renewing.start()
    renewing.join(10)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def _own_request(tls: Path) -> str:
    key = certificates.private_key(tls / "node.key")
    assert key is not None
    return signing_request(key, "x")


def _first_byte_of_answer(head: Head, tls: Path) -> bytes:
    context = ssl.create_default_context(cafile=str(tls / "ca.pem"))
    context.load_cert_chain(tls / "node.pem", tls / "node.key")
    host, port = head.url.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=5, source_address=(NODE_ADDRESS, 0)) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        secured.sendall(b"\0\0\0\2{}")
        return secured.recv(1)


def _is_due(tls: Path) -> bool:
    certificate = x509.load_pem_x509_certificate((tls / "node.pem").read_bytes())
    return certificates.in_last_third(certificate, dt.datetime.now(dt.UTC))


def _with_edge(application: Callable[..., object]) -> Callable[..., object]:
    return lambda head, **changes: application(head, edge=True, **changes)
