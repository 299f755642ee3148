"""Requests without an identity in a real HAProxy: counted, not written down."""

from __future__ import annotations

import socket
import ssl

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.edge.haproxy.unauthenticated import SHOW_COMMAND, Reason, RefusalCounts, parse_counts
from tests.edge import PREDICT, Edge, wait_until

NUMBERS = st.lists(st.integers(min_value=0, max_value=5), max_size=8)


def raw(edge: Edge, data: bytes) -> None:
    """Send what need not be HTTP, and hear it out."""
    with (
        socket.create_connection(("127.0.0.1", edge.port), timeout=5) as plain,
        edge.context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        try:
            connection.sendall(data)
            while connection.recv(65_536):
                pass
        except (ConnectionError, ssl.SSLError):
            pass


def test_strangers_are_counted_by_what_was_wrong_and_not_logged(edge: Edge) -> None:
    """Those too whom HAProxy cannot parse, and health checks; a known principal's mistakes are records."""
    before, logged = parse_counts(edge.ask(SHOW_COMMAND)), len(edge.records())
    for _ in range(3):
        assert edge.call()[0] == 401
    assert edge.call(token="a.b.c")[0] == 401
    assert edge.call(token=edge.token(ttl_s=-60))[0] == 401
    assert edge.call("/elsewhere")[0] == 404
    assert edge.call("/v2/health/live", method="GET")[0] == 200
    raw(edge, b"NONSENSE\r\n\r\n")
    raw(edge, f"GET {PREDICT} HTTP/1.1\r\nbad header\r\n\r\n".encode())
    after = parse_counts(edge.ask(SHOW_COMMAND))
    added = {reason: after[reason] - before[reason] for reason in Reason}
    assert added == {Reason.identity: 5, Reason.request: 3}
    assert edge.call("/v1/models/none:predict", token=edge.token(subject="known"))[0] == 404
    wait_until(lambda: len(edge.records()) > logged)
    (record,) = edge.records()[logged:]
    assert (record["principal"], record["status"]) == ("known", 404)


@settings(max_examples=30)
@given(st.lists(NUMBERS, max_size=5))
def test_events_add_up_to_what_the_workers_counted(workers: list[list[int]]) -> None:
    """Looked at after every few requests, over reloads, each of which begins at nothing."""
    seen, told, at = RefusalCounts(reported_at=0.0), 0, 0.0
    for steps in workers:
        counted, seen = 0, seen.reset_worker()
        for step in steps:
            counted, at = counted + step, at + 1
            seen = seen.update({Reason.identity: counted, Reason.request: 0})
            seen, events = seen.report(at=at)
            told += sum(event.count for event in events)
            assert all(event.first_at == at - 1 and event.last_at == at for event in events)
    assert told == sum(sum(steps) for steps in workers)


def test_what_haproxy_shows_is_read() -> None:
    """Nothing has been counted where the table is empty."""
    assert parse_counts("# table: strangers_counted, type: string, size:1, used:0\n") == {
        Reason.identity: 0,
        Reason.request: 0,
    }
    shown = "0x1: key=strangers use=1 exp=0 shard=0 http_err_cnt=5 gpc0=7 gpc1=2 gpc2=4\n"
    assert parse_counts(shown) == {Reason.identity: 7, Reason.request: 3}
