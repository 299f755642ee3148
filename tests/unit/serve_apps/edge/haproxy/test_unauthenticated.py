"""Unauthenticated requests in a real HAProxy: counted, but not logged."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.edge.haproxy.unauthenticated import SHOW_COMMAND, Reason, RefusalCounts, parse_counts
from tests.servers.edge import PREDICT, Edge
from tests.servers.polling import wait_until

NUMBERS = st.lists(st.integers(min_value=0, max_value=5), max_size=8)


def test_unauthenticated_requests_are_counted_by_reason_and_not_logged(edge: Edge) -> None:
    """Requests that HAProxy cannot parse are counted, too. Mistakes of a known principal are in the access log."""
    before, logged = parse_counts(edge.ask(SHOW_COMMAND)), len(edge.records())
    for _ in range(3):
        assert edge.call()[0] == 401
    assert edge.call(token="a.b.c")[0] == 401
    assert edge.call(token=edge.token(ttl_s=-60))[0] == 401
    assert edge.call("/elsewhere")[0] == 404
    assert edge.call("/v2/health/live", method="GET")[0] == 200
    edge.exchange(b"NONSENSE\r\n\r\n")
    edge.exchange(f"GET {PREDICT} HTTP/1.1\r\nbad header\r\n\r\n".encode())
    after = parse_counts(edge.ask(SHOW_COMMAND))
    added = {reason: after[reason] - before[reason] for reason in Reason}
    assert added == {Reason.identity: 5, Reason.request: 3}
    assert edge.call("/v1/models/none:predict", token=edge.token(subject="known"))[0] == 404
    wait_until(lambda: len(edge.records()) > logged)
    (record,) = edge.records()[logged:]
    assert (record["principal"], record["status"]) == ("known", 404)


@settings(max_examples=30)
@given(st.lists(NUMBERS, max_size=5))
def test_events_add_up_to_the_workers_counts(workers: list[list[int]]) -> None:
    """Read after every few requests, across reloads, each of which starts at zero."""
    refusals, reported, at = RefusalCounts(reported_at=0.0), 0, 0.0
    for steps in workers:
        counted, refusals = 0, refusals.reset_worker()
        for step in steps:
            counted, at = counted + step, at + 1
            refusals = refusals.update({Reason.identity: counted, Reason.request: 0})
            refusals, events = refusals.report(at=at)
            reported += sum(event.count for event in events)
            assert all(event.first_at == at - 1 and event.last_at == at for event in events)
    assert reported == sum(sum(steps) for steps in workers)


def test_counts_are_parsed_from_haproxys_table() -> None:
    """An empty table counts nothing."""
    assert parse_counts("# table: unauthenticated_counted, type: string, size:1, used:0\n") == {
        Reason.identity: 0,
        Reason.request: 0,
    }
    table_text = "0x1: key=unauthenticated use=1 exp=0 shard=0 http_err_cnt=5 gpc0=7 gpc1=2 gpc2=4\n"
    assert parse_counts(table_text) == {Reason.identity: 7, Reason.request: 3}
