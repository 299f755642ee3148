"""A promotion of model `m` from version 1 to version 2, by a policy with or without a holdback."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.ledger import Ledger
from cluster.statistics.breaker import LastRequests
from cluster.statistics.evidence import Evidence
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.json_form import as_json
from tests.samples.policies import HEALTHY, SPEC, WITH_POLICY, EvidenceDouble, SetClock, permitted
from tests.samples.rollouts import DEPLOYED, STARTED

ALL_FAILED = replace(HEALTHY, events={}, last=LastRequests(requests=20, failures=20, units=9))
STEPS = 3


def promoted_ledger(
    url: str, *, holdback: bool, counts: Evidence = HEALTHY, **arguments: Any
) -> tuple[Ledger, Controller, EvidenceDouble]:
    """Return a ledger after a promotion by the controller, the controller, and its counts."""
    ledger = Ledger(url, **arguments)
    plan = as_json(replace(SPEC, holdback=holdback).plan())
    for event in (*DEPLOYED, STARTED, replace(WITH_POLICY, plan=plan)):
        ledger.append(event, actor="ann")
    double = EvidenceDouble()
    clock = SetClock(arguments["clock"]) if "clock" in arguments else None
    acting = Controller(ledger, double, refusal=permitted, clock=clock)
    for _ in range(STEPS):
        acting.check_once()
    double.counts = counts
    return ledger, acting, double
