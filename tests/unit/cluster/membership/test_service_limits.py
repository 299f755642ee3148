"""Tests of what a hostile or new client can do to the head's service for nodes."""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster import join
from cluster.errors import ConfigError, InvalidRequest
from cluster.host.port_owner import client_uid
from cluster.membership.members import Members
from cluster.membership.service import JOIN_S, SILENT_S, NodeService
from cluster.membership.transport import MAX_UNKNOWN_PER_ADDRESS, client_context, connect
from cluster.node.other_nodes import status_of
from cluster.node.parts import State
from cluster.security.authorization.policy import Action, Policy, Resource
from cluster.security.keys.guarded import decide_by_all
from cluster.security.keys.wire import receive, send
from cluster.security.tokens.intent import remove_expired
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from tests.unit.cluster.membership.conftest import NODE_ADDRESS, Head


def test_silent_clients_of_one_address_do_not_stop_others(head: Head) -> None:
    """Too many connections without a certificate are closed. Those that a node has open go on."""
    _, client = head.join()
    host, port = head.url.split(":")
    silent = [
        socket.create_connection((host, int(port)), source_address=("127.0.0.9", 0), timeout=5)
        for _ in range(MAX_UNKNOWN_PER_ADDRESS)
    ]
    try:
        with socket.create_connection((host, int(port)), source_address=("127.0.0.9", 0), timeout=4) as last:
            assert last.recv(1) == b""
        assert client.request("nodes") is not None
    finally:
        for connection in silent:
            connection.close()


def test_a_client_without_certificate_has_one_request(head: Head) -> None:
    """So it cannot occupy the service for long."""
    _, application = head.application(token="")
    authority = (Path(head.record.layout.tls) / "ca.pem").read_text()
    context = client_context(authority=authority)
    with connect(head.url, context, own_address=NODE_ADDRESS) as connection:
        send(connection, {"op": "join", **asdict(application)}, timeout_s=5)
        assert receive(connection, idle_s=5, read_s=5) is not None
        assert connection.recv(1) == b""


@pytest.mark.parametrize(
    "parts",
    [{"raylet": "r" * 33}, {"\x1b[2J": "dead"}, {str(n): "dead" for n in range(40)}, {"raylet": 1}, []],
)
def test_a_report_has_short_words_only(head: Head, parts: object) -> None:
    """All readers of `cluster.status` get it."""
    _, client = head.join()
    with pytest.raises(InvalidRequest, match="A report has"):
        client.request("report", parts=parts)


def test_status_shows_known_parts_only(head: Head) -> None:
    """The text of a node is never printed as it is."""
    _, client = head.join()
    client.request("report", parts={"evil": "dead", "raylet": "evil"})
    [node] = map(status_of, client.request("nodes"))  # type: ignore[call-overload]
    assert (node.state, node.text) == (State.running, "running")


def test_a_new_node_and_a_new_service_wait_for_the_first_report(head: Head) -> None:
    """A live node must not be replaced or removed because the service was restarted."""
    now = time.monotonic()
    node_id, _ = head.join()
    members = Members(head.ledger, "abc")
    clock = [now]
    restarted = NodeService(
        config=head.config, record=head.record, ledger=head.ledger, members=members, clock=lambda: clock[0]
    )
    assert restarted._alive() == {node_id}
    clock[0] += SILENT_S + 1
    assert restarted._alive() == set()
    assert head.service._alive() == {node_id}
    head.service.clock = lambda: now + JOIN_S + 60
    assert head.service._alive() == set()


def test_a_node_gets_keys_of_its_own_and_the_heads_region_only() -> None:
    """The head's broker reads the key in one region, and the node uses it in another."""
    principal = Principal(subject="ann", role=Role.admin, purpose="credit_scoring", expires_at=0)
    key = Resource(kind="key", name="k", column_class="personal", purposes=("credit_scoring",), region="eu")
    eu = Policy.load(region="eu")
    allowed = [
        decide_by_all(policies, principal, Action.unwrap_key, key, environment="production").allowed
        for policies in ([eu], [eu, eu], [eu, eu.in_region("us")], [eu.in_region("us"), eu])
    ]
    assert allowed == [True, True, False, False]


def test_expired_intents_are_removed(tmp_path: Path) -> None:
    """Those of jobs that were killed on another node."""
    old, new = tmp_path / f"a-{uuid.uuid4().hex}.jwt", tmp_path / "b.jwt"
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    remove_expired(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


@pytest.mark.parametrize(("ahead_s", "text"), [(31.0, "31 s ahead of"), (-45.0, "45 s behind")])
def test_a_clock_that_differs_from_the_heads_is_refused(ahead_s: float, text: str) -> None:
    """Tokens would be refused later, with messages that do not name the clock."""
    join.check_clock(29.0)
    with pytest.raises(ConfigError, match=f"clock is {text} the head's.*NTP"):
        join.check_clock(ahead_s)


def test_the_head_sends_its_time(head: Head) -> None:
    """A joining machine compares it with its own."""
    _, application = head.application()
    assert abs(float(str(head.ask(application)["time"])) - time.time()) < 10


def test_the_user_of_a_loopback_client_is_known() -> None:
    """The port of the dashboard on a node is for its owner only."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            assert client_uid(accepted) == os.geteuid()
