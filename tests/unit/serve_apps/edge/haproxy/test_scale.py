"""Any number of models, versions and replicas: no line of HAProxy's configuration grows with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_apps.edge.haproxy.config import render
from serve_apps.edge.haproxy.routes import Routes, routes
from serve_apps.rollout.serving_state import ModelState, Rollout
from tests.servers.edge import Edge

ROLLOUT = Rollout(id="r", salt="s", treatment_version=2, treatment_variant="challenger", weight=50)


def many_routes(models: int, replicas: int, edge: Edge) -> Routes:
    """Models with a champion and a treatment each, whose first replica is real."""
    real = edge.targets["m-v1"]
    others = tuple(f"127.0.0.1:{10 + number}" for number in range(replicas - 1))
    states = {
        f"model-{n}": ModelState(
            champion_version=1, apps={1: f"model-{n}-v1", 2: f"model-{n}-v2"}, rollout=ROLLOUT
        )
        for n in range(models)
    }
    apps = [app for state in states.values() for app in state.apps.values()]
    return routes(states, dict.fromkeys(apps, (*real, *others)))


def longest_line(text: str) -> int:
    """Number of words in the longest line. HAProxy takes 64; quoted text is one word for HAProxy, and several here."""
    return max(len(line.split()) for line in text.splitlines())


@pytest.mark.parametrize(("models", "replicas"), [(200, 1), (1, 200)])
def test_no_line_has_too_many_words(edge: Edge, models: int, replicas: int) -> None:
    """For any number of models, versions and replicas, with and without waiting requests."""
    few, text = (
        render(wanted, edge.keys, replace(edge.settings, serve_proxy="127.0.0.1:9"))
        for wanted in (many_routes(1, 1, edge), many_routes(models, replicas, edge))
    )
    assert longest_line(text) == longest_line(few)


def test_edge_serves_every_one_of_many_models(whole: Edge) -> None:
    """Loaded, ready when all champions are, split, and limited by a token's scope."""
    whole.load_routes(many_routes(40, 1, whole))
    assert whole.call("/v2/health/ready", method="GET")[0] == 200
    last = "/v1/models/model-39:predict"
    status, echo = whole.call(last, token=whole.token(), headers={"X-Unit-ID": "u"})
    assert (status, echo["path"].split("/")[1][:8]) == (200, "model-39")
    scoped = whole.token(scope="openid model:model-3 model:model-39 model:model-3.")
    assert whole.call(last, token=scoped)[0] == 200
    for other in ("model-9", "model-390", "odel-39", "model-3x", "model-"):
        assert whole.call(f"/v1/models/{other}:predict", token=scoped)[0] == 403
