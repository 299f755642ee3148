"""What clients noticed of a failure: failed requests, and the time until the rate of good answers is back."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from tests.clients.balanced_load import Sent

WINDOW_S = 1.0
ENOUGH = 0.8
"""The rate is back if a second has this share of the usual number of good answers."""
SETTLED_S = 3.0
"""Later failures at surviving edges are counted apart."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The figures of one failure."""

    sent: int
    failed: int
    failed_elsewhere: int
    """Failed requests among those sent to an edge that clients could reach all the time."""
    failed_later: int
    """Those of them that were sent more than `SETTLED_S` after the failure."""
    recovery_s: float
    longest_s: float
    """Longest time of a good answer."""
    reasons: dict[str, int]
    """Number of failed requests by kind, server and status."""


def summarize(sent: Collection[Sent], *, at: float, per_s: float, lost_edge: str | None) -> Outcome:
    """Return the figures of the requests that were sent or unanswered since a failure.

    Args:
        sent: requests with their results.
        at: monotonic time of the failure.
        per_s: usual rate of all requests.
        lost_edge: server that clients could not reach.
    """
    since = [one for one in sent if one.answered_at >= at]
    failed = [one for one in since if not one.is_good]
    elsewhere = [one for one in failed if one.server != lost_edge]
    reasons: dict[str, int] = {}
    for one in failed:
        name = f"{one.kind} at {one.server}: {one.status or one.content}"
        reasons[name] = reasons.get(name, 0) + 1
    return Outcome(
        sent=len(since),
        failed=len(failed),
        failed_elsewhere=len(elsewhere),
        failed_later=sum(one.at > at + SETTLED_S for one in elsewhere),
        recovery_s=recovery_s(since, at=at, per_s=per_s),
        longest_s=max((one.took_s for one in since if one.is_good), default=0.0),
        reasons=reasons,
    )


def recovery_s(sent: Collection[Sent], *, at: float, per_s: float) -> float:
    """Return the seconds from a failure to the end of the last second with too few good answers, 0 if there is none.

    The seconds are counted from the failure. The last ones are left out, because requests sent then have no answer yet.
    """
    if not sent:
        return 0.0
    last = max(one.at for one in sent)
    good = [0] * max(0, math.floor((last - at) / WINDOW_S) - 1)
    for one in sent:
        window = math.floor((one.answered_at - at) / WINDOW_S)
        if one.is_good and 0 <= window < len(good):
            good[window] += 1
    bad = [number for number, count in enumerate(good) if count < ENOUGH * per_s * WINDOW_S]
    return (bad[-1] + 1) * WINDOW_S if bad else 0.0
