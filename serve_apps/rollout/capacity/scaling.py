"""Holds up a step until the version that gets more units has enough replicas for them."""

from __future__ import annotations

import datetime as dt
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from cluster.ledger import Ledger
from cluster.ledger.events import ReplicasRequested
from cluster.ledger.store import utc_now
from serve_apps.rollout.capacity.requested import Request, RequestedReplicas
from serve_apps.rollout.capacity.serve import Capacity, FetchCapacities
from serve_apps.rollout.transitions import ACTOR

MAX_WAIT_S = 600.0
"""Longest wait for one step. Then the step is taken, and more replicas start with the load."""
KEPT_AFTER_WAIT_S = 60.0
"""A request outlasts the longest wait by so much, also after the rollout's deadline."""
LOG = logging.getLogger("falaj.rollouts")


@dataclass(frozen=True, kw_only=True, slots=True)
class NextStep:
    """The step that a rollout is about to take."""

    model: str
    rollout: str
    champion: int | None
    version: int
    """The version that gets more units."""
    weight: float
    """Percentage of units after the step: 100 for a promotion."""
    ends_at: dt.datetime
    """The rollout's deadline. The requested replicas are kept until then, and at least for the longest wait."""


def needed_replicas(champion: int, weight: float, treatment: Capacity) -> int:
    """Return how many replicas the treatment needs for a share of the requests.

    Args:
        champion: Number of replicas with which the champion answers all requests.
        weight: Percentage of units.
        treatment: Bounds of the treatment.
    """
    needed = max(1, treatment.minimum, math.ceil(champion * weight / 100 - 1e-9))
    return min(needed, treatment.maximum)


class StepScaling:
    """Scales the receiving version before a step, and keeps the champion's replicas.

    Args:
        ledger: The ledger.
        capacities: Fetches what Serve has.
        clock: Returns the time, in UTC.
    """

    def __init__(
        self, ledger: Ledger, capacities: FetchCapacities, *, clock: Callable[[], dt.datetime] = utc_now
    ) -> None:
        self._ledger = ledger
        self._capacities = capacities
        self._clock = clock
        self._requested = RequestedReplicas(ledger)

    def not_ready(self, step: NextStep) -> str:
        """Return what the step waits for, or "" if the version is ready, cannot be scaled, or was waited for.

        Raises:
            SQLAlchemyError: The ledger does not answer.
        """
        try:
            capacities = self._capacities()
        except (OSError, ValueError) as error:
            LOG.warning("Serve does not say how many replicas run, so none are requested: %s", error)
            return ""
        treatment = capacities.get(f"{step.model}-v{step.version}")
        champion = capacities.get(f"{step.model}-v{step.champion}")
        if treatment is None or champion is None:
            return ""
        self._requested.update()
        kept = self._keep_champion(step, champion)
        if treatment.is_fixed:
            self._request(step, step.version, treatment.minimum, "the number of replicas is fixed")
            return ""
        needed = needed_replicas(kept, step.weight, treatment)
        request = self._request(step, step.version, needed, f"a share of {step.weight:g} %")
        if treatment.ready >= needed:
            return ""
        if (self._clock() - request.since).total_seconds() > MAX_WAIT_S:
            LOG.warning("%d of %d replicas of %s are ready; the step is taken", treatment.ready, needed, step)
            return ""
        return f"scaling challenger: {treatment.ready} of {needed} replicas ready"

    def _keep_champion(self, step: NextStep, champion: Capacity) -> int:
        """Request the champion's present number of replicas, and return it: a rollback needs all of them at once."""
        before = self._requested.find(step.model, step.champion or 0, now=self._clock())
        ours = before if before is not None and before.rollout == step.rollout else None
        number = max(champion.ready, ours.replicas if ours else 0, 1)
        if not champion.is_fixed:
            self._request(step, step.champion or 0, number, "full capacity for a rollback")
        return number

    def _request(self, step: NextStep, version: int, replicas: int, reason: str) -> Request:
        """Request a number of replicas, unless it is requested already."""
        now = self._clock()
        before = self._requested.find(step.model, version, now=now)
        if before is not None and (before.rollout, before.replicas) == (step.rollout, replicas):
            return before
        until = max(step.ends_at, now + dt.timedelta(seconds=MAX_WAIT_S + KEPT_AFTER_WAIT_S))
        event = ReplicasRequested(
            model=step.model,
            rollout=step.rollout,
            version=version,
            replicas=replicas,
            until=until.isoformat(timespec="microseconds"),
            reason=reason,
        )
        self._ledger.append(event, actor=ACTOR)
        self._requested.update()
        found = self._requested.find(step.model, version, now=now)
        return found or Request(rollout=step.rollout, replicas=replicas, since=now, until=until)
