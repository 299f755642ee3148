"""After a promotion, a real HAProxy sends control to the predecessor, and all other units to the new champion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve_apps.edge.haproxy.routes import entry
from serve_apps.rollout.assignment import HOLDBACK_WEIGHT, Arm, assign, bounds
from serve_apps.rollout.evidence.access_records import Request, parse
from serve_apps.rollout.serving_state import ModelState, Watch
from tests.servers.edge import SALT, Edge
from tests.servers.ports import free_port


def unit_of(arm: Arm) -> str:
    """Return a unit of an arm, as Python assigns it."""
    limits = bounds(HOLDBACK_WEIGHT)
    return next(str(n) for n in range(100_000) if assign(SALT, str(n).encode(), limits) is arm)


def promote(edge: Edge, *, holdback: bool) -> None:
    """Give the edge the map entry after a promotion of version 2."""
    watch = Watch(rollout="r1", salt=SALT, version=2, predecessor=1, holdback=holdback)
    state = ModelState(champion_version=2, apps={1: "m-v1", 2: "m-v2"}, watch=watch)
    text = entry(state)
    assert text is not None
    edge.haproxy.set_map(Path(edge.settings.map_file), "m", text)


def answered(edge: Edge, unit: str) -> tuple[str, str, Request]:
    """Send a request, and return the version and variant that answered, and what its access record counts as."""
    status, echo = edge.call(token=edge.token(), headers={"X-Unit-ID": unit} if unit else {})
    assert status == 200
    record = edge.logged(echo["x-request-id"] if "x-request-id" in echo else echo["x-falaj-request-id"])
    request = parse(json.dumps(record).encode())
    assert request is not None
    assert request.rollout == "r1-watch"
    return echo["path"].split("/")[1], record["variant"], request


@pytest.mark.parametrize(
    ("arm", "version", "variant"),
    [
        (Arm.treatment, "m-v2", "champion"),
        (Arm.control, "m-v1", "predecessor"),
        (Arm.outside, "m-v2", "champion"),
    ],
)
def test_holdback_gives_control_to_the_predecessor(whole: Edge, arm: Arm, version: str, variant: str) -> None:
    """Only the predecessor's answers count as those that the new champion is compared with."""
    promote(whole, holdback=True)
    *by, request = answered(whole, unit_of(arm))
    assert (*by, request.arm) == (version, variant, arm)
    assert request.by_champion is (arm is Arm.control)


def test_request_without_a_unit_gets_the_new_champion(whole: Edge) -> None:
    """It is in no arm, also after a promotion."""
    promote(whole, holdback=True)
    *by, request = answered(whole, "")
    assert (*by, request.arm, request.is_in_experiment) == ("m-v2", "champion", Arm.none, False)


@pytest.mark.parametrize("arm", [Arm.treatment, Arm.control, Arm.outside])
def test_without_a_holdback_every_unit_is_treated_by_the_new_champion(whole: Edge, arm: Arm) -> None:
    """So the breaker sees all its requests. Nothing counts as the other version's."""
    promote(whole, holdback=False)
    *by, request = answered(whole, unit_of(arm))
    assert (*by, request.arm, request.by_champion) == ("m-v2", "champion", Arm.treatment, False)
    assert not request.failed


def test_champion_answers_for_a_dead_predecessor(whole: Edge) -> None:
    """No request fails. It counts as a failure of control."""
    whole.load_targets(whole.targets | {"m-v1": (f"127.0.0.1:{free_port()}",)})
    promote(whole, holdback=True)
    *by, request = answered(whole, unit_of(Arm.control))
    assert (*by, request.arm, request.failed) == ("m-v2", "champion", Arm.control, True)
