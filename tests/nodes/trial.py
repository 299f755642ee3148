"""One failure under load: let it happen, repair it, and wait until the usual rate of good answers is back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.clients.balanced_load import BalancedLoad, Sent
from tests.nodes.failures import Failure, System
from tests.nodes.outcomes import ENOUGH, Outcome, summarize

BEFORE_S = 4.0
STEADY_S = 6.0
"""The rate must be usual for this long."""
LONGEST_S = 150.0
"""A system that has not recovered by then is recorded as it is."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The requests of one failure and their figures."""

    failure: Failure
    sent: list[Sent]
    outcome: Outcome
    repair_s: float
    """How long the repair itself took."""


def run_trial(
    system: System,
    failure: Failure,
    load: BalancedLoad,
    *,
    per_s: float,
    after: Callable[[], None] | None = None,
) -> Trial:
    """Let a failure happen under load, and repair it.

    Args:
        system: the cluster.
        failure: what happens.
        load: requests to send.
        per_s: their rate.
        after: called under load after the repair.
    """
    with load:
        time.sleep(BEFORE_S)
        at = time.monotonic()
        failure.happen(system)
        time.sleep(max(0.0, at + failure.repair_after_s - time.monotonic()))
        repairing = time.monotonic()
        failure.repair(system)
        repair_s = time.monotonic() - repairing
        if after is not None:
            after()
        wait_until_steady(load, per_s=per_s)
    outcome = summarize(load.sent, at=at, per_s=per_s, lost_edge=failure.lost_edge)
    return Trial(failure=failure, sent=load.sent, outcome=outcome, repair_s=repair_s)


def wait_until_steady(load: BalancedLoad, *, per_s: float) -> None:
    """Wait until all servers are healthy and the rate was usual for some seconds. Give up after `LONGEST_S`."""
    began = since = time.monotonic()
    seen = len(load.sent)
    while (now := time.monotonic()) < began + LONGEST_S:
        time.sleep(1.0)
        new = load.sent[seen:]
        seen += len(new)
        good = sum(one.is_good for one in new)
        elapsed = time.monotonic() - now
        if good < ENOUGH * per_s * elapsed - 1 or good < len(new) or len(load.healthy()) < len(load.servers):
            since = time.monotonic()
        if time.monotonic() - since >= STEADY_S:
            return
