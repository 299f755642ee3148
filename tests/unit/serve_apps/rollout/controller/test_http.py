"""`GET` and `POST /v1/rollouts/{model}`: each caller with its own rights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import PolicyEnded, PolicyPaused, PolicyStarted, RolloutRolledBack, RolloutStarted
from cluster.registry import Registry
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Policy
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.roles import Role
from cluster.security.tokens.trust import Trust
from cluster.settings import IssuerConfig
from cluster.storage import Layout
from serve_apps.rollout import transitions
from serve_apps.rollout.controller.http import RolloutApi
from serve_apps.rollout.controller.operations import RolloutOperations
from serve_apps.rollout.evidence.store import EvidenceStore
from serve_apps.rollout.history import read_history
from serve_apps.rollout.serving_state import read_states
from tests.samples.model_versions import registered
from tests.samples.rollouts import DEPLOYED

PATH = "/v1/rollouts/m"
POLICY: dict[str, Any] = {
    "steps": [{"weight": 20}, {"weight": 50}],
    "event_guardrails": [{"event": "failure", "limit": 0.05}],
    "traffic": {"units_per_hour": 1000, "events": {"failure": 0.01}},
}
LINEAR: dict[str, Any] = {"mode": "linear"} | {name: POLICY[name] for name in ("event_guardrails", "traffic")}
TINY = POLICY["traffic"] | {"units_per_hour": 5e-324}
START = {"action": "start", "version": 2, "policy": POLICY}


class Service:
    """The application, and a ledger with two deployed versions."""

    def __init__(self, root: Path) -> None:
        self.places = Layout(str(root))
        ensure_issuer(self.places)
        self.ledger = Ledger(f"sqlite:///{root}/ledger.db")
        for event in (registered("m", 1), registered("m", 2), registered("m", 3), *DEPLOYED):
            self.ledger.append(event, actor="bob")
        operations = RolloutOperations(
            cost=lambda app: {"replicas": 1},
            ledger=self.ledger,
            store=EvidenceStore(self.ledger.engine),
            registry=Registry(self.ledger, self.places),
            trust=Trust.of(IssuerConfig(), self.places),
            policy=Policy.load(region="local"),
            region="local",
            environment="local",
            decisions=DecisionRecorder(self.ledger.append),
        )
        self.client = TestClient(RolloutApi(operations).app())

    def call(self, body: Any = None, *, role: Role = Role.ml_engineer, path: str = PATH) -> tuple[int, Any]:
        token = mint_token(self.places, subject="ann", role=role, purpose="p", ttl_s=60)
        headers = {"authorization": f"Bearer {token}"}
        answer = (
            self.client.get(path, headers=headers)
            if body is None
            else self.client.post(path, headers=headers, json=body)
        )
        return answer.status_code, answer.json()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    opened = Service(tmp_path)
    yield opened
    opened.ledger.close()


def test_rollout_is_started_shown_paused_and_rolled_back(service: Service) -> None:
    """The events have the caller. `GET` says what is missing for the next step."""
    status, started = service.call(START)
    assert status == 200, started
    status, shown = service.call()
    assert (status, shown["rollout"]["weight"], shown["policy"]["step"]) == (200, 20, "1 of 2")
    assert "units: 0 of 277" in shown["policy"]["now"]["missing"]
    assert service.call({"action": "pause", "reason": "lunch"})[0] == 200
    assert service.call({"action": "pause"})[0] == 200
    assert service.call()[1]["policy"]["paused"]
    assert len(list(service.ledger.entries(PolicyPaused))) == 1
    assert service.call({"action": "resume"})[0] == 200
    assert service.call({"action": "abort", "reason": "enough"})[0] == 200
    ended = service.ledger.last(PolicyEnded)
    assert ended is not None
    assert (ended.payload["outcome"], ended.payload["reason"], ended.actor) == (
        "aborted",
        "aborted enough",
        "ann",
    )
    policy = service.ledger.last(PolicyStarted)
    assert policy is not None
    assert policy.payload["starter"]["subject"] == "ann"
    assert read_states(service.ledger)["m"].rollout is None


def test_rollout_without_a_policy_has_a_weight(service: Service) -> None:
    """It can be rolled back, but neither paused nor aborted."""
    assert service.call({"action": "start", "version": 2, "weight": 5})[0] == 200
    assert read_history(service.ledger, "m").run is None
    assert service.call({"action": "pause"})[0] == 409
    assert service.call({"action": "abort"})[0] == 409
    assert service.call({"action": "rollback"})[0] == 200
    assert service.ledger.last(RolloutRolledBack) is not None


def nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for _ in range(depth):
        content = {"steps": content}
    return content


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ([], 400, "Send an object with an action"),
        ({"action": "promote"}, 400, "No action 'promote'"),
        ({"action": "pause", "version": 2}, 400, "has no field 'version'"),
        ({"action": "rollback", "reason": ""}, 400, "'reason' must be a text"),
        ({"action": "start", "version": "2", "weight": 5}, 400, "'version' must be"),
        ({"action": "start", "version": True, "weight": 5}, 400, "'version' must be"),
        ({"action": "start", "version": 2}, 400, "either 'weight' or 'policy'"),
        ({"action": "start", "version": 2, "weight": 0.001}, 400, "weight must be 0.01 to 100"),
        ({"action": "start", "version": 2, "weight": "5"}, 400, "'weight' must be a number"),
        ({**START, "policy": {"mode": "${oc.env:HOME}"}}, 400, "without interpolations"),
        ({**START, "policy": {**POLICY, "stepz": []}}, 400, "stepz"),
        ({**START, "policy": {**POLICY, "deadline_s": 60}}, 409, "its deadline is after"),
        ({**START, "policy": nested(900)}, 400, "poli"),
        ({**START, "policy": LINEAR | {"increment": 1e-9}}, 400, "at most 100 steps"),
        ({**START, "policy": LINEAR | {"increment": 5e-324}}, 400, "at most 100 steps"),
        ({**START, "policy": {**POLICY, "steps": [{"weight": 1}] * 101}}, 400, "at most 100 steps"),
        ({**START, "policy": {**POLICY, "bake_s": 10**400}}, 400, "too large"),
        ({**START, "policy": POLICY | {"traffic": TINY}}, 400, "too small"),
        ({"action": "start", "version": 2, "weight": 10**400}, 400, "too large"),
        ({**START, "version": 1}, 409, "already the champion"),
        ({**START, "version": 3}, 409, "is not deployed"),
        ({**START, "version": 9}, 404, "9"),
        ({"action": "rollback"}, 409, "No rollout of 'm' runs"),
    ],
)
def test_wrong_change_is_refused(service: Service, body: Any, status: int, message: str) -> None:
    """Nothing is appended."""
    before = service.ledger.head()
    answered, content = service.call(body)
    assert (answered, message in content["error"]) == (status, True), content
    assert service.ledger.head() == before
    assert service.ledger.last(RolloutStarted) is None


@pytest.mark.parametrize("role", [Role.service, Role.auditor, Role.data_scientist])
def test_role_without_the_right_changes_nothing(service: Service, role: Role) -> None:
    """It may still look."""
    assert service.call(START, role=role)[0] == 403
    assert service.call(role=role)[0] == 200
    assert service.ledger.last(RolloutStarted) is None


def test_salt_is_not_shown(service: Service) -> None:
    """With it, a caller could choose unit ids of one arm. Any role may look."""
    assert service.call(START)[0] == 200
    status, shown = service.call(role=Role.auditor)
    assert (status, shown["rollout"]["weight"], "salt" in shown["rollout"]) == (200, 20, False)


@pytest.mark.parametrize("action", ["rollback", "abort"])
def test_rollback_is_tried_again_after_a_decision_at_the_same_moment(
    service: Service, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """Another event of the model comes between reading and appending."""
    assert service.call(START)[0] == 200
    original, tries = transitions.append, []

    def append_late(ledger: Ledger, model: str, *arguments: Any, **named: Any) -> list[Entry] | None:
        if not tries:
            ledger.append(PolicyPaused(model=model, rollout=rollout_id(service), reason=""), actor="bob")
        tries.append(model)
        return original(ledger, model, *arguments, **named)

    monkeypatch.setattr(transitions, "append", append_late)
    status, content = service.call({"action": action})
    assert (status, len(tries)) == (200, 2), content
    assert read_states(service.ledger)["m"].rollout is None


def rollout_id(service: Service) -> str:
    rollout = read_states(service.ledger)["m"].rollout
    assert rollout is not None
    return rollout.id


def test_policy_is_not_parsed_without_the_right(service: Service) -> None:
    """Validation costs time and memory, so the right is checked first."""
    assert service.call({**START, "policy": {"no": "policy"}}, role=Role.service)[0] == 403


def test_unknown_model_and_missing_token(service: Service) -> None:
    """Both have the status of every other path."""
    assert service.call(path="/v1/rollouts/none")[0] == 404
    assert service.client.get(PATH).status_code == 401
    assert service.client.put(PATH).status_code == 405
