"""A rollout of model `m` that follows a policy, and a double of the evidence."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent, PolicyStarted
from cluster.statistics.evidence import EventCounts, Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.policy import UnitEvent
from serve_apps.rollout.controller.clock import LookClock
from serve_apps.rollout.evidence.store import Counting
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.policy.sections import EventGuardrailSpec, StepSpec, TrafficSpec
from serve_apps.rollout.policy.spec import RolloutSpec
from tests.samples.rollouts import DEPLOYED, STARTED

SPEC = RolloutSpec(
    steps=[StepSpec(weight=weight) for weight in (20, 30, 50)],
    event_guardrails=[EventGuardrailSpec(event=UnitEvent.failure, limit=0.05)],
    traffic=TrafficSpec(units_per_hour=20_000, events={"failure": 0.01}),
)
STARTER = {"subject": "ann", "role": "ml_engineer", "purpose": "p", "tenant": "default", "models": None}
WITH_POLICY = PolicyStarted(
    model="m",
    rollout="r",
    version=2,
    policy="short",
    plan=as_json(SPEC.plan()),
    traffic=as_json(SPEC.expected_traffic()),
    slow_ms=None,
    scoring={},
    starter=STARTER,
)
EVENTS: tuple[LedgerEvent, ...] = (*DEPLOYED, STARTED, WITH_POLICY)
HEALTHY = Evidence(
    step=0,
    window=0,
    step_s=7200,
    total_s=7200,
    watched_units=20_000,
    events={UnitEvent.failure: EventCounts(treatment=3, control=4, watched=3)},
)
FAILING = replace(HEALTHY, events={UnitEvent.failure: EventCounts(treatment=40, control=0, watched=40)})
EARLY = replace(HEALTHY, watched_units=5, events={})


def started_ledger(url: str) -> Ledger:
    """Return a ledger in which the rollout has started."""
    ledger = Ledger(url)
    for event in EVENTS:
        ledger.append(event, actor="ann")
    return ledger


class SetClock(LookClock):
    """A clock of looks that a test sets. No jump is noticed."""

    def now(self) -> dt.datetime:
        """Return the time."""
        return self._wall()


@dataclass
class EvidenceDouble:
    """A double of the evidence store: the same counts at each look, with the step that the controller asks for."""

    counts: Evidence = HEALTHY
    before: Callable[[], None] = lambda: None
    asked: list[dict[str, object]] = field(default_factory=list)
    registered: list[tuple[str, Counting]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def evidence(
        self,
        rollout_id: str,
        plan: Plan,
        *,
        step: int,
        step_started_at: dt.datetime,
        started_at: dt.datetime,
        now: dt.datetime,
    ) -> Evidence:
        """Return the counts."""
        self.before()
        weight = plan.policy.steps[step].weight
        asked = {"rollout": rollout_id, "step": step, "weight": weight, "since": step_started_at, "now": now}
        self.asked.append(asked)
        return replace(self.counts, step=step, window=step)

    def ensure_registered(self, rollout_id: str, counting: Counting, *, is_new: bool = False) -> None:
        """Remember that the rollout was registered."""
        self.registered.append((rollout_id, counting))

    def requests(self, rollout_id: str) -> dict[str, int]:
        """Return the same numbers for each rollout."""
        return {"treatment": 7, "control": 8, "none": 1}

    def counted(self) -> set[str]:
        """Return the rollouts that were registered and not forgotten."""
        return {rollout for rollout, _ in self.registered} - set(self.forgotten)

    def forget(self, rollout_id: str) -> bool:
        """Remember that the rollout was forgotten."""
        self.forgotten.append(rollout_id)
        return False


def permitted(starter: dict[str, object], model: str, version: int) -> str:
    """Permit everything."""
    return ""
