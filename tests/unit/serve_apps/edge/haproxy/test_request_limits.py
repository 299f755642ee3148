"""Limits of principals and tenants, and model scopes, in a real HAProxy."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ledger.events import EdgeLimitSet
from cluster.security.tokens.roles import Role
from serve_apps.edge.haproxy.request_limits import DEFAULT_KEY, Limit, Limited, OwnLimits
from serve_apps.edge.limits import LimitAction, LimitsCommand
from tests.servers.edge import PREDICT, ROLLOUT, Echo, Edge, Mirror
from tests.servers.polling import wait_until

WIDE = Limit(requests_per_s=100_000, concurrent=1000)
NAMES = st.text(min_size=1, max_size=20)
NUMBERS = st.none() | st.integers(min_value=1, max_value=10)


@pytest.fixture
def limited(edge: Edge) -> Iterator[Edge]:
    """An edge with 20 requests a second and 3 concurrent ones for a principal, and twice that for the tenant."""
    before = edge.settings
    edge.settings = replace(
        before,
        limits=replace(
            before.limits,
            principal=Limit(requests_per_s=20, concurrent=3),
            tenant=Limit(requests_per_s=40, concurrent=6),
        ),
    )
    edge.load(ROLLOUT)
    yield edge
    edge.settings = before
    edge.load(ROLLOUT)


class Answer(NamedTuple):
    """An answer of the edge."""

    status: int
    head: str
    content: dict[str, Any]


def flood(edge: Edge, *subjects: str, predictions: tuple[int, ...]) -> list[Answer]:
    """Send a request for each principal in one write, so that all fall within a second on a busy machine, too.

    Args:
        predictions: the requests that are predictions; the edge answers the others itself.
    """
    requests = []
    for number, subject in enumerate(subjects):
        what = (
            f"POST {PREDICT} HTTP/1.1\r\nContent-Length: 0" if number in predictions else "GET /v2 HTTP/1.1"
        )
        requests.append(f"{what}\r\nHost: x\r\nAuthorization: Bearer {edge.token(subject=subject)}\r\n")
    requests[-1] += "Connection: close\r\n"
    with edge.send("".join(f"{request}\r\n" for request in requests).encode()) as connection:
        received = b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
    parts = [answer.partition("\r\n\r\n") for answer in received.split("HTTP/1.1 ")[1:]]
    return [Answer(int(head[:3]), head.lower(), json.loads(body)) for head, _, body in parts]


def test_principal_over_its_rate_is_429_and_others_are_answered(limited: Edge) -> None:
    """Each principal has its own count, within the tenant's limit."""
    answers = flood(limited, *["alice"] * 25, *["bob"] * 20, "carol", predictions=(0, 24))
    assert [answer.status for answer in answers] == [200] * 20 + [429] * 5 + [200] * 20 + [429]
    alice, carol = answers[24], answers[-1]
    assert "retry-after: 1\r\n" in f"{alice.head}\r\n"
    refusal = "Your principal sent too many requests in one second; try again."
    assert alice.content == {"error": refusal, "code": 429}
    assert "tenant" in carol.content["error"]
    assert limited.call("/v2/health/live", method="GET")[0] == 200


def test_refused_requests_do_not_count(limited: Edge) -> None:
    """A principal over its limit still gets as many answers as the limit allows."""
    ended, answered = time.monotonic() + 1, 0
    while time.monotonic() < ended:
        answered += sum(answer.status == 200 for answer in flood(limited, *["dora"] * 5, predictions=(0,)))
        time.sleep(0.02)  # still far more often than allowed
    assert 20 <= answered <= 50


def test_too_many_concurrent_requests_are_429(limited: Edge) -> None:
    """The next request is accepted when one of them has been answered."""
    with Mirror(HeldEcho) as replica, ThreadPoolExecutor(3) as pool:
        limited.load_targets(limited.targets | {"m-v1": (replica.address,)})
        open_requests = [pool.submit(limited.call, token=limited.token(subject="erik")) for _ in range(3)]
        for _ in open_requests:
            assert HeldEcho.arrived.acquire(timeout=10)
        status, content = limited.call("/v2", method="GET", token=limited.token(subject="erik"))
        assert (status, content["error"]) == (429, "Your principal has too many requests open; try again.")
        assert limited.call("/v2", method="GET", token=limited.token(subject="fred"))[0] == 200
        HeldEcho.release.set()
        assert {answer.result()[0] for answer in open_requests} == {200}
    wait_until(lambda: limited.call("/v2", method="GET", token=limited.token(subject="erik"))[0] == 200)


class HeldEcho(Echo):
    """Answers when it may."""

    arrived, release = threading.Semaphore(0), threading.Event()

    def do_POST(self) -> None:
        self.arrived.release()
        self.release.wait(10)
        super().do_POST()


@pytest.mark.parametrize("subject", ["alice", "a b/ü%|#", "-x", "user:alice@example.org"])
def test_principal_may_have_its_own_limit(edge: Edge, subject: str) -> None:
    """For any name; set in the running HAProxy, and removed by the next change."""
    own = OwnLimits().apply(
        EdgeLimitSet(limited="principal", name=subject, requests_per_s=2, concurrent=None)
    )
    file = edge.settings.limits.file(Limited.principal)
    for key, value in own.entries(Limited.principal, WIDE).items():
        edge.haproxy.set_map(file, key, value)
    answers = flood(edge, *[subject] * 4, *["somebody else"] * 4, predictions=(0, 3))
    assert [answer.status for answer in answers] == [200, 200, 429, 429] + [200] * 4
    for key in own.entries(Limited.principal, WIDE):
        edge.haproxy.del_map(file, key)
    assert edge.call(token=edge.token(subject=subject))[0] == 200


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(Limited), NAMES, NUMBERS, NUMBERS), max_size=8))
def test_last_limit_of_each_name_counts(changes: list[tuple[Limited, str, int | None, int | None]]) -> None:
    """Unset parts are the default's; each name has one map entry, or none if both parts are unset."""
    own = OwnLimits()
    for kind, name, rate, concurrent in changes:
        own = own.apply(
            EdgeLimitSet(limited=kind.value, name=name, requests_per_s=rate, concurrent=concurrent)
        )
    last = {(kind, name): (rate, concurrent) for kind, name, rate, concurrent in changes}
    expected = {key: numbers for key, numbers in last.items() if numbers != (None, None)}
    for kind in Limited:
        entries = own.entries(kind, WIDE)
        assert entries.pop(DEFAULT_KEY) == "100000|1000"
        assert len(entries) == sum(key[0] is kind for key in expected)
        assert all(key.isascii() and " " not in key and "#" not in key for key in entries)
    for (kind, name), (rate, concurrent) in last.items():
        limit = own.limit(kind, name, WIDE)
        assert limit == Limit(requests_per_s=rate or 100_000, concurrent=concurrent or 1000)


@given(
    rate=st.integers(min_value=1, max_value=1000),
    concurrent=st.integers(min_value=1, max_value=1000),
    num_edges=st.integers(min_value=1, max_value=20),
)
def test_shares_of_all_edges_are_at_most_the_limit(rate: int, concurrent: int, num_edges: int) -> None:
    """A limit lower than the number of edges is the exception: each edge still lets one request through."""
    share = Limit(requests_per_s=rate, concurrent=concurrent).share(num_edges)
    for part, whole in ((share.requests_per_s, rate), (share.concurrent, concurrent)):
        assert part * num_edges <= max(whole, num_edges)
        assert (part + 1) * num_edges > whole


def test_default_of_the_map_replaces_the_static_default(edge: Edge) -> None:
    """So another number of edges needs no reload; an own limit still counts before it."""
    own = OwnLimits().apply(EdgeLimitSet(limited="principal", name="own", requests_per_s=9, concurrent=None))
    file = edge.settings.limits.file(Limited.principal)
    entries = own.entries(Limited.principal, Limit(requests_per_s=6, concurrent=300), num_edges=3)
    assert entries == {DEFAULT_KEY: "2|100", "own": "3|100"}
    for key, value in entries.items():
        edge.haproxy.set_map(file, key, value)
    answers = flood(edge, *["own"] * 4, *["other"] * 4, predictions=(0, 7))
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 200, 200, 429, 429]
    for key in entries:
        edge.haproxy.del_map(file, key)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"principal": "a", "tenant": "b"},
        {"principal": "é" * 101},
        {"principal": ""},
        {"tenant": "a", "requests_per_s": 0},
        {"tenant": "a", "concurrent": -1},
        {"tenant": "a", "requests_per_s": 2**31},
    ],
)
def test_invalid_limit_is_refused(options: dict[str, Any]) -> None:
    """It is refused before the command contacts the cluster."""
    with pytest.raises(ValueError, match=r"limit|name|Name either"):
        LimitsCommand(**options)
    assert LimitsCommand(action=LimitAction.show).name == ""


@pytest.mark.parametrize(
    ("scope", "status"),
    [
        ("", 200),
        ("openid profile", 200),
        ("model:m", 200),
        ("openid model:x model:m", 200),
        ("model:mm", 403),
        ("model:M", 403),
        ("xmodel:m model:n", 403),
        ("model:", 403),
        ("model:x", 403),
    ],
)
def test_scope_with_models_allows_no_others(edge: Edge, scope: str, status: int) -> None:
    """Predictions and metadata; without such words the role decides."""
    token = edge.token(scope=scope)
    for method, path in (("POST", PREDICT), ("GET", "/v2/models/m"), ("POST", "/v2/models/m/infer")):
        answered, content = edge.call(path, method=method, token=token)
        assert (answered, content.get("code", 200)) == (status, status)
    assert edge.call("/v2", method="GET", token=token)[0] == 200
    assert edge.call(token=edge.token(Role.auditor, scope="model:m"))[0] == 403
