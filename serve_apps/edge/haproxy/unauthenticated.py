"""Counts of unauthenticated requests, by reason; they are not logged one by one.

HAProxy counts them, including requests that it cannot parse. The controller reads the counts periodically and appends
the increase to the ledger. Only requests with a valid token get the log level that reaches the access log, so an
unauthenticated client cannot fill the disk.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field, replace

from cluster.ledger.events import StrangersRefused
from serve_apps.edge.haproxy.counters import Counter

REPORT_INTERVAL_S = 60.0
"""Seconds between two reports to the ledger."""
TABLE = "strangers_counted"
SHOW_COMMAND = f"show table {TABLE}"
LOG_LEVEL = "emerg"


class Reason(enum.Enum):
    """Why a request was refused, as text of the ledger's event."""

    identity = "The edge refused a request without a valid token."
    request = (
        "The edge refused a request without a token that could not be read, was too slow or led nowhere."
    )


_STATUSES = {Reason.identity: "401", Reason.request: "402:407 409:499"}
"""Statuses that rules answer with. Requests that cannot be parsed or come too slowly meet no rule; HAProxy counts them
as errors (`http_err_cnt`)."""

_REPLICA_REFUSALS = len(Reason)
"""Index of the counter of replicas' own refusals. HAProxy counts these as errors, too, so they are subtracted."""


def table() -> str:
    """Return the section of the table that counts; it lives as long as the worker."""
    stored = f"gpc({len(Reason) + 1}),http_err_cnt"
    return f"backend {TABLE}\n    stick-table type string len 9 size 1 store {stored}\n"


def rules() -> str:
    """Return the frontend's rules that count unauthenticated requests."""
    anonymous = "!{ var(txn.principal) -m found }"
    number = int(Counter.refusals)
    lines = [
        f"    tcp-request session track-sc{number} str(strangers) table {TABLE}",
        *(
            f"    http-after-response sc-inc-gpc({index},{number}) if {anonymous} {{ status {_STATUSES[reason]} }}"
            for index, reason in enumerate(Reason)
        ),
        f"    http-response sc-inc-gpc({_REPLICA_REFUSALS},{number}) if {{ status 400:499 }}",
    ]
    return "\n".join(lines)


def log_authenticated() -> str:
    """Return the rule that gives an authenticated request the log level of access records."""
    return f"    http-request set-log-level {LOG_LEVEL}"


def parse_counts(table_text: str) -> dict[Reason, int]:
    """Parse an HAProxy worker's counts of refusals from its answer to `SHOW_COMMAND`."""
    found = {name: int(count) for name, count in re.findall(r"(gpc\d+|http_err_cnt)=(\d+)", table_text)}
    counts = {reason: found.get(f"gpc{index}", 0) for index, reason in enumerate(Reason)}
    counts[Reason.request] += max(0, found.get("http_err_cnt", 0) - found.get(f"gpc{_REPLICA_REFUSALS}", 0))
    return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalCounts:
    """Refusals that HAProxy's workers counted, and those not yet reported to the ledger."""

    reported_at: float
    """Unix seconds of the last report."""
    worker_counts: dict[Reason, int] = field(default_factory=dict)
    """Counts of the serving worker, when it was last read."""
    unreported: dict[Reason, int] = field(default_factory=dict)

    def update(self, worker_counts: dict[Reason, int]) -> RefusalCounts:
        """Add what the worker has counted since the last read.

        A count that is lower than before comes from a worker that restarted, so all of it is new.
        """
        unreported = dict(self.unreported)
        for reason, count in worker_counts.items():
            previous = self.worker_counts.get(reason, 0)
            unreported[reason] = unreported.get(reason, 0) + (
                count - previous if count >= previous else count
            )
        return replace(self, worker_counts=worker_counts, unreported=unreported)

    def reset_worker(self) -> RefusalCounts:
        """Forget the old worker's counts after a reload of HAProxy: the new worker starts at zero."""
        return replace(self, worker_counts={})

    def report(self, *, at: float) -> tuple[RefusalCounts, list[StrangersRefused]]:
        """Return the counts with nothing left to report, and one event for each unreported count."""
        events = [
            StrangersRefused(reason=reason.value, count=count, first_at=self.reported_at, last_at=at)
            for reason, count in self.unreported.items()
            if count
        ]
        return replace(self, reported_at=at, unreported={}), events
