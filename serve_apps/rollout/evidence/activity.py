"""The newest requests of a rollout at one edge: the treatment's last 20, and the champion's since then.

It is a few hundred bytes for each rollout, and is stored with the position in the edge's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.statistics.breaker import REQUESTS, LastRequests
from serve_apps.rollout.assignment import Arm
from serve_apps.rollout.evidence.access_records import Request


class Treated(NamedTuple):
    """A request of the treatment."""

    ended_ms: int
    unit: str
    failed: bool
    champion_requests: int
    """Number of the champion's requests at this edge before this one."""
    champion_failures: int


@dataclass(kw_only=True, slots=True)
class Activity:
    """What one edge saw of one rollout."""

    requests: dict[str, int] = field(default_factory=dict)
    """Number of requests by arm; `none` has those without a unit."""
    last_ms: dict[str, int] = field(default_factory=dict)
    """Time of the last request by arm, in Unix milliseconds."""
    champion_requests: int = 0
    champion_failures: int = 0
    last: list[Treated] = field(default_factory=list)

    @classmethod
    def from_plain(cls, values: dict[str, object]) -> Activity:
        """Return what `dataclasses.asdict` has made to plain values."""
        activity = cls(**values)  # type: ignore[arg-type]
        activity.last = [Treated(*one) for one in activity.last]
        return activity

    def add(self, request: Request) -> None:
        """Count one more request. Requests of a backlog may come after newer ones."""
        arm = request.arm
        self.requests[arm] = self.requests.get(arm, 0) + 1
        self.last_ms[arm] = max(self.last_ms.get(arm, 0), request.ended_ms)
        if arm == Arm.treatment:
            treated = Treated(
                request.ended_ms,
                request.unit,
                request.failed,
                self.champion_requests,
                self.champion_failures,
            )
            self.last = sorted((*self.last, treated), key=lambda one: one.ended_ms)[-REQUESTS:]
        elif request.by_champion and not request.gave_up and not self._is_old(request):
            self.champion_requests += 1
            self.champion_failures += request.failed

    def _is_old(self, request: Request) -> bool:
        """Return whether a request ended before all of the treatment's last ones."""
        return bool(self.last) and request.ended_ms < self.last[0].ended_ms


def last_requests(activities: Sequence[Activity]) -> LastRequests:
    """Return the last requests at all edges together.

    The champion's requests at an edge are counted from the edge's own first of these requests on, so with several edges
    a few are left out.
    """
    newest = sorted(one for activity in activities for one in activity.last)[-REQUESTS:]
    if not newest:
        return LastRequests()
    since = newest[0].ended_ms
    champion_requests = champion_failures = 0
    for activity in activities:
        first = next((one for one in activity.last if one.ended_ms >= since), None)
        if first is not None:
            champion_requests += activity.champion_requests - first.champion_requests
            champion_failures += activity.champion_failures - first.champion_failures
    return LastRequests(
        requests=len(newest),
        failures=sum(one.failed for one in newest),
        units=len({one.unit for one in newest}),
        champion_requests=champion_requests,
        champion_failures=champion_failures,
    )


def last_of_arm(activities: Iterable[Activity], arm: Arm) -> int | None:
    """Return the time of an arm's last request, in Unix milliseconds; None if there was none."""
    return max((one.last_ms[arm] for one in activities if arm in one.last_ms), default=None)
