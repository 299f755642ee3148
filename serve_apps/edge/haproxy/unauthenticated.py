"""Count unauthenticated requests by reason. They are not logged one by one.

HAProxy counts these requests, and also requests that it cannot parse. The controller reads the counts periodically and
appends each increase to the ledger. Only requests with a valid token have an access record. So a client without a token
cannot fill the disk.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field, replace

from cluster.ledger.events import StrangersRefused
from serve_apps.edge.haproxy.counters import Counter

REPORT_INTERVAL_S = 60.0
"""Seconds between two reports to the ledger."""
TABLE = "unauthenticated_counted"
SHOW_COMMAND = f"show table {TABLE}"
LOG_LEVEL = "emerg"


class Reason(enum.Enum):
    """Why a request was refused. The value is the text in the ledger event."""

    identity = "The edge refused a request without a valid token."
    request = (
        "The edge refused a request without a token that could not be read, was too slow or led nowhere."
    )


_STATUSES = {Reason.identity: "401", Reason.request: "402:407 409:499"}
"""Statuses of the rules that refuse. Requests that cannot be parsed or arrive too slowly do not reach any rule. HAProxy
counts these as errors (`http_err_cnt`)."""

_REPLICA_REFUSALS = len(Reason)
"""Index of the counter of requests that replicas refused. HAProxy counts them as errors, too, so it is subtracted."""


def table() -> str:
    """Return the section of the table with the counts. The table exists as long as the worker."""
    stored = f"gpc({len(Reason) + 1}),http_err_cnt"
    return f"backend {TABLE}\n    stick-table type string len 15 size 1 store {stored}\n"


def rules() -> str:
    """Return the frontend's rules that count unauthenticated requests."""
    anonymous = "!{ var(txn.principal) -m found }"
    number = int(Counter.refusals)
    lines = [
        f"    tcp-request session track-sc{number} str(unauthenticated) table {TABLE}",
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
    """Parse a worker's answer to `SHOW_COMMAND`, and return the number of refused requests by reason."""
    found = {name: int(count) for name, count in re.findall(r"(gpc\d+|http_err_cnt)=(\d+)", table_text)}
    counts = {reason: found.get(f"gpc{index}", 0) for index, reason in enumerate(Reason)}
    counts[Reason.request] += max(0, found.get("http_err_cnt", 0) - found.get(f"gpc{_REPLICA_REFUSALS}", 0))
    return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalCounts:
    """Numbers of refused requests: those that a worker counted, and those that are not in the ledger yet."""

    reported_at: float
    """Unix seconds of the last report."""
    worker_counts: dict[Reason, int] = field(default_factory=dict)
    """Counts of the serving worker, from the last time that they were read."""
    unreported: dict[Reason, int] = field(default_factory=dict)

    def update(self, worker_counts: dict[Reason, int]) -> RefusalCounts:
        """Return the counts with what the worker has counted since the last read.

        If a count is lower than before, the worker was restarted, so the whole count is new.
        """
        unreported = dict(self.unreported)
        for reason, count in worker_counts.items():
            previous = self.worker_counts.get(reason, 0)
            unreported[reason] = unreported.get(reason, 0) + (
                count - previous if count >= previous else count
            )
        return replace(self, worker_counts=worker_counts, unreported=unreported)

    def reset_worker(self) -> RefusalCounts:
        """Return the counts without those of the old worker. After a reload, the new worker starts at zero."""
        return replace(self, worker_counts={})

    def report(self, *, at: float) -> tuple[RefusalCounts, list[StrangersRefused]]:
        """Return one event for each unreported count, and the counts after the report."""
        events = [
            StrangersRefused(reason=reason.value, count=count, first_at=self.reported_at, last_at=at)
            for reason, count in self.unreported.items()
            if count
        ]
        return replace(self, reported_at=at, unreported={}), events
