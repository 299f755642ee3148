"""Requests without a valid identity: counted by what was wrong, and not written down one by one.

HAProxy counts them, those included that it cannot parse. The controller reads the counts now and then and puts into the
ledger what has been added. Only a request whose token held is of the level that reaches the access log: whoever wants
to fill our disks has to be somebody.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field, replace

from cluster.ledger.events import StrangersRefused

EVERY_S = 60.0
TABLE = "strangers_counted"
SHOWN = f"show table {TABLE}"
LEVEL = "emerg"
_NUMBER = 2
"""Of the counter in HAProxy; the first two are those of `limiting`."""


class Reason(enum.Enum):
    """What was wrong, as events say it."""

    identity = "The edge refused a request without a valid token."
    request = (
        "The edge refused a request without a token that could not be read, was too slow or led nowhere."
    )


_STATUSES = {Reason.identity: "401", Reason.request: "402:407 409:499"}
"""Of answers that a rule gives. What HAProxy cannot parse, or what comes too slowly, meets no rule: it is an error."""

_ANSWERED = len(Reason)
"""Refusals by replicas, which HAProxy counts as errors, too."""


def table() -> str:
    """The section that counts, as long as the worker lives."""
    stored = f"gpc({len(Reason) + 1}),http_err_cnt"
    return f"backend {TABLE}\n    stick-table type string len 9 size 1 store {stored}\n"


def rules() -> str:
    """Rules that count a stranger's request; a frontend's."""
    stranger = "!{ var(txn.principal) -m found }"
    lines = [
        f"    tcp-request session track-sc{_NUMBER} str(strangers) table {TABLE}",
        *(
            f"    http-after-response sc-inc-gpc({index},{_NUMBER}) if {stranger} {{ status {_STATUSES[reason]} }}"
            for index, reason in enumerate(Reason)
        ),
        f"    http-response sc-inc-gpc({_ANSWERED},{_NUMBER}) if {{ status 400:499 }}",
    ]
    return "\n".join(lines)


def known() -> str:
    """The rule for who is no stranger: the request becomes an access record."""
    return f"    http-request set-log-level {LEVEL}"


def counts(shown: str) -> dict[Reason, int]:
    """What the worker has counted, from its answer to `SHOWN`."""
    found = {name: int(count) for name, count in re.findall(r"(gpc\d+|http_err_cnt)=(\d+)", shown)}
    counted = {reason: found.get(f"gpc{index}", 0) for index, reason in enumerate(Reason)}
    counted[Reason.request] += max(0, found.get("http_err_cnt", 0) - found.get(f"gpc{_ANSWERED}", 0))
    return counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the workers have counted, and what of it has not been told yet."""

    at: float
    """Unix seconds, when it was told last."""
    counted: dict[Reason, int] = field(default_factory=dict)
    """By the worker that serves, when it was last looked at."""
    untold: dict[Reason, int] = field(default_factory=dict)

    def look(self, counted: dict[Reason, int]) -> Seen:
        """Add what the worker has counted since; one that began again by itself has all of its own."""
        untold = dict(self.untold)
        for reason, count in counted.items():
            before = self.counted.get(reason, 0)
            untold[reason] = untold.get(reason, 0) + (count - before if count >= before else count)
        return replace(self, counted=counted, untold=untold)

    def begin_again(self) -> Seen:
        """After a reload: the new worker has counted nothing yet."""
        return replace(self, counted={})

    def tell(self, *, at: float) -> tuple[Seen, list[StrangersRefused]]:
        """The events for what has not been told."""
        events = [
            StrangersRefused(reason=reason.value, count=count, first_at=self.at, last_at=at)
            for reason, count in self.untold.items()
            if count
        ]
        return replace(self, at=at, untold={}), events
