"""The breaker: a treatment that answers nothing is rolled back at once, without statistics.

It fires if the last 20 requests of the treatment all failed, they came from at least 3 units, and the champion was
healthy in the same span of time. One unit whose requests always fail does not fire it. Neither does an outage of both
versions: then a rollback would not help.
"""

from __future__ import annotations

from dataclasses import dataclass

REQUESTS, UNITS = 20, 3
"""Number of requests in a row that must fail, and of units that they must come from."""
MIN_CHAMPION_REQUESTS, MAX_CHAMPION_FAILURES = 5, 0.2
"""The champion is healthy if it got so many requests, and at most this share of them failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastRequests:
    """The treatment's last 20 requests, and the champion's requests in the same span of time."""

    requests: int = 0
    """Number of the treatment's last requests, at most 20."""
    failures: int = 0
    units: int = 0
    """Number of units that they came from."""
    champion_requests: int = 0
    """Number of the champion's requests since the first of these requests, in and outside the experiment."""
    champion_failures: int = 0


def is_open(last: LastRequests) -> bool:
    """Return whether the breaker fires: the treatment fails completely, and the champion does not."""
    champion_healthy = (
        last.champion_requests >= MIN_CHAMPION_REQUESTS
        and last.champion_failures <= MAX_CHAMPION_FAILURES * last.champion_requests
    )
    return all_failed(last) and champion_healthy


def all_failed(last: LastRequests) -> bool:
    """Return whether the last 20 requests all failed, and came from several units. Nothing says how others did."""
    return last.failures == last.requests >= REQUESTS and last.units >= UNITS
