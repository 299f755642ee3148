"""What an access record counts as."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.statistics.policy import UnitEvent
from serve_apps.rollout.evidence.access_records import (
    BrokenRecord,
    Request,
    load,
    refusal_of,
    request_of,
    routed_model,
)
from serve_apps.rollout.evidence.activity import Activity, last_requests
from tests.samples.access_records import GOOD, line


def parse(text: bytes) -> Request | None:
    return request_of(load(text))


@pytest.mark.parametrize(
    ("fields", "event"),
    [
        ({}, None),
        ({"status": 500}, UnitEvent.failure),
        ({"status": 503}, UnitEvent.failure),
        ({"status": 504, "termination": "sH"}, UnitEvent.failure),
        ({"status": 503, "termination": "LR"}, UnitEvent.failure),  # no healthy replica
        ({"status": -1, "termination": "SH"}, UnitEvent.failure),
        ({"status": 200, "termination": "SD"}, UnitEvent.failure),  # the answer was cut
        ({"fallback": "1", "variant": "champion"}, UnitEvent.failure),
        ({"fallback": "1", "variant": "champion", "termination": "CD"}, UnitEvent.failure),
        ({"status": 422}, UnitEvent.refusal),
        ({"status": -1, "termination": "CH"}, UnitEvent.slow),
        ({"status": 200, "termination": "cD"}, UnitEvent.slow),
        ({"latency_ms": 101}, UnitEvent.slow),
        ({"latency_ms": 100}, None),
        ({"latency_ms": 9000, "status": 422}, UnitEvent.refusal),
    ],
)
@pytest.mark.parametrize("arm", ["treatment", "control"])
def test_a_request_counts_as_at_most_one_event(
    arm: str, fields: dict[str, Any], event: UnitEvent | None
) -> None:
    """Both arms are counted alike: fallback, 5xx and timeout as failures, a client that gave up as slow."""
    request = parse(line(arm=arm, **fields))
    assert request is not None
    assert request.event(100.0) == event


@pytest.mark.parametrize(
    "fields",
    [
        {"status": 429, "termination": "LR", "arm": "-"},
        {"status": 400, "termination": "LR"},
        {"rollout": "none"},
        {"rollout": "-", "arm": "-"},
        {"action": "read_metadata"},
    ],
)
def test_refusals_by_the_edge_and_other_requests_are_no_evidence(fields: dict[str, Any]) -> None:
    """No replica saw the request, no rollout ran, or it was no prediction."""
    assert parse(line(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "is_refusal"),
    [
        ({"status": 422}, True),
        ({"status": 429, "termination": "LR", "arm": "-", "rollout": "-"}, True),
        ({"status": 401, "principal": "-"}, False),
        ({"status": 401, "principal": ""}, False),
        ({"status": 400, "termination": "CR"}, False),
        ({"status": 404, "action": "read_metadata"}, False),
        ({"status": 200}, False),
        ({"status": 503}, False),
    ],
)
def test_refused_predictions_are_counted_by_model_and_hour(fields: dict[str, Any], is_refusal: bool) -> None:
    """Those of the edge and of replicas, during a rollout or not. A client without a valid token counts nowhere."""
    record = load(line(**fields))
    assert refusal_of(record) == (("m", "2027-01-15T08") if is_refusal else None)
    assert routed_model(record) == ("m" if fields.get("rollout") != "-" else None)


def test_records_of_an_older_release_are_no_evidence() -> None:
    """They do not say by which split the arm was chosen."""
    old = {name: value for name, value in GOOD.items() if name not in ("below", "ended_ms")}
    assert parse(json.dumps(old).encode()) is None
    assert refusal_of(old | {"status": 422}) is None


def test_a_request_without_a_unit_is_in_no_arm() -> None:
    """It is still a request of the champion."""
    request = parse(line(arm="none", unit_hash="-", below="2000"))
    assert request is not None
    assert (request.is_in_experiment, request.by_champion) == (False, True)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x00\x00",
        b'{"time":1',
        line()[:-20],
        line()[200:],
        b"[1]",
        b"7",
        line(arm="elsewhere"),
        line(below="x"),
        line(status="x"),
        line(termination=""),
    ],
)
def test_a_line_that_is_no_record_is_broken(text: bytes) -> None:
    """It is one kind of error, so that the reader counts it and goes on."""
    with pytest.raises(BrokenRecord):
        parse(text.rstrip(b"\n"))


def activity_of(*fields: dict[str, Any]) -> Activity:
    activity = Activity()
    for values in fields:
        request = parse(line(**values))
        assert request is not None
        activity.add(request)
    return activity


def test_last_requests_of_one_edge() -> None:
    """The treatment's last 20, and the champion's requests since the first of these, in and outside the experiment."""
    before = [{"arm": "outside", "status": 500, "ended_ms": time} for time in range(10)]
    treated = [{"status": 500, "unit_hash": f"u{time % 3}", "ended_ms": 10 + 2 * time} for time in range(25)]
    champion = [{"arm": arm, "ended_ms": 11 + 2 * time} for time in range(25) for arm in ("control", "none")]
    champion[-1]["status"] = 500
    mixed = sorted((*before, *treated, *champion), key=lambda fields: fields["ended_ms"])
    last = last_requests([activity_of(*mixed)])
    assert (last.requests, last.failures, last.units) == (20, 20, 3)
    assert (last.champion_requests, last.champion_failures) == (40, 1)


def test_last_requests_of_two_edges() -> None:
    """They are merged by time. An edge without any of them adds none of the champion's."""
    first = activity_of(*({"ended_ms": time, "unit_hash": "a"} for time in range(0, 40, 2)))
    second = activity_of(
        *({"ended_ms": time, "unit_hash": "b", "status": 500} for time in range(1, 41, 2)),
        {"arm": "control", "ended_ms": 50},
    )
    old = activity_of({"ended_ms": -5}, {"arm": "control", "ended_ms": 60})
    last = last_requests([first, second, old])
    assert (last.requests, last.failures, last.units, last.champion_requests) == (20, 10, 2, 1)
    assert last_requests([]).requests == 0
