"""Limits of each principal and tenant: requests per second, and concurrent requests.

The limits in ledger events become entries of HAProxy's maps, and rules enforce them. Only accepted requests are
counted, over a sliding second. So if a client sends twice as many requests as its limit, about half of them are
answered.

Counts survive a reload, because the old worker sends them to the new worker as its peer. Requests that the old worker
still answers do not count as concurrent in the new worker.

Each edge counts by itself, so it allows its share: the limit divided by the number of live edges, rounded down, and at
least 1. Over all edges that is at most the limit, unless the limit is lower than the number of edges. A client gets all
of its limit only if its requests go to all edges alike.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import quote

from cluster.ledger.events import EdgeLimitSet, LedgerEvent, Subject, require_known
from serve_apps.edge.haproxy.answers import refuse
from serve_apps.edge.haproxy.counters import Counter

MAX_NAME_BYTES = 200
"""Longest name of a principal or a tenant. A token's claim has the same limit."""
NAMELESS = "-"
"""Name for all subjects that HAProxy cannot read, such as JSON escapes beyond Latin-1. They have one common count."""
DEFAULT_KEY = "*"
"""Key of a map's default. No name has it, because `url_enc` escapes it."""
_IDLE = "1m"
_MAX_COUNTED = "100k"


class Limited(enum.Enum):
    """What a limit applies to."""

    principal = "principal"
    tenant = "tenant"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """Limits of one principal or tenant."""

    requests_per_s: int
    concurrent: int
    """Requests that may be open at the same time."""

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if not 1 <= value < 2**31:
                raise ValueError(f"A limit's {part.name} must be at least 1 and below 2^31, got {value}.")

    def share(self, num_edges: int) -> Limit:
        """Return one edge's share of this limit."""
        return Limit(
            requests_per_s=max(1, self.requests_per_s // num_edges),
            concurrent=max(1, self.concurrent // num_edges),
        )

    def entry(self) -> str:
        """Return the value of a map entry."""
        return f"{self.requests_per_s}|{self.concurrent}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Default limits, and the folder of the files with the limits of single principals and tenants."""

    principal: Limit
    tenant: Limit
    folder: str
    """Folder of the two map files."""
    socket: str
    """Socket through which the old worker sends its counts to the new one, in a folder of the cluster's user."""

    def of(self, limited: Limited) -> Limit:
        """Return the default limit of a principal or of a tenant."""
        return self.principal if limited is Limited.principal else self.tenant

    def file(self, limited: Limited) -> Path:
        """Return the map file with the limits of single principals or of single tenants."""
        return Path(self.folder) / f"{limited.value}-limits.map"


@dataclass(frozen=True, slots=True)
class OwnLimits:
    """Limits of single principals and tenants, computed from ledger events."""

    set: Mapping[tuple[Limited, str], EdgeLimitSet] = field(default_factory=dict)

    def apply(self, event: LedgerEvent) -> OwnLimits:
        """Return the limits after one more event. Events about anything else change nothing.

        Raises:
            ReleaseTooOld: a newer release wrote the event, and it changes limits.
        """
        require_known(event, Subject.limit)
        if not isinstance(event, EdgeLimitSet) or event.limited not in Limited.__members__:
            return self
        key = (Limited(event.limited), event.name)
        others = {other: limit for other, limit in self.set.items() if other != key}
        is_removal = event.requests_per_s is None and event.concurrent is None
        return OwnLimits(others if is_removal else others | {key: event})

    def limit(self, limited: Limited, name: str, default: Limit) -> Limit:
        """Return the limit of one principal or tenant. Values that were not set for it come from `default`."""
        own = self.set.get((limited, name))
        if own is None:
            return default
        return Limit(
            requests_per_s=default.requests_per_s if own.requests_per_s is None else own.requests_per_s,
            concurrent=default.concurrent if own.concurrent is None else own.concurrent,
        )

    def entries(self, limited: Limited, default: Limit, *, num_edges: int = 1) -> dict[str, str]:
        """Return the map of all principals or all tenants, with the default first.

        Names are escaped as by HAProxy's converter `url_enc`.

        Args:
            limited: the kind.
            default: limit of all without an own limit.
            num_edges: number of live edges, of which this one takes its share.
        """
        names = sorted(name for kind, name in self.set if kind is limited)
        limits = {quote(name, safe=""): self.limit(limited, name, default) for name in names}
        entries = {DEFAULT_KEY: default} | limits
        return {key: limit.share(num_edges).entry() for key, limit in entries.items()}


def tables(limits: Limits) -> str:
    """Return the sections of the tables that count."""
    stored = "store gpc0,gpc0_rate(1s),conn_cur"
    counted = "\n".join(
        f"backend {_table(kind)}\n    stick-table type string len {MAX_NAME_BYTES} size {_MAX_COUNTED} "
        f"expire {_IDLE} peers edge {stored}\n"
        for kind in Limited
    )
    return f"peers edge\n    peer edge unix@{limits.socket}\n\n{counted}"


def rules(limits: Limits, *, tenant: str) -> str:
    """Return rules that refuse requests over a limit with 429, and count all other requests.

    Args:
        limits: the default limits, and the folder of the map files.
        tenant: the tenant if a token names none.
    """
    lines = [
        f"    http-request set-var(txn.principal) str({NAMELESS}) unless {{ var(txn.principal) -m len gt 0 }}",
        f"    http-request set-var(txn.tenant) str({tenant}) unless {{ var(txn.tenant) -m found }}",
        *(line for kind in Limited for line in _limit_rules(kind, limits)),
        *(f"    http-request sc-inc-gpc0({_counter(kind)})" for kind in Limited),
    ]
    return "\n".join(lines)


def _limit_rules(kind: Limited, limits: Limits) -> list[str]:
    """Return the rules for principals or for tenants: look up the limit, compare rate and concurrency, refuse."""
    name, default, number = f"txn.{kind.value}", limits.of(kind).entry(), _counter(kind)
    file = limits.file(kind)
    own, fast, many = (f"{kind.value}_{word}" for word in ("has_own_limit", "too_fast", "too_much"))
    retry = "hdr retry-after 1"
    return [
        f"    http-request track-sc{number} var({name}) table {_table(kind)}",
        f"    http-request set-var({name}_limit) var({name}),url_enc,map_str({file})",
        f"    acl {own} var({name}_limit) -m found",
        f"    http-request set-var({name}_limit) str({DEFAULT_KEY}),map_str({file},{default}) unless {own}",
        f"    http-request set-var({name}_rate) var({name}_limit),field(1,|)",
        f"    http-request set-var({name}_concurrent) var({name}_limit),field(2,|)",
        f"    acl {fast} sc{number}_gpc0_rate,sub({name}_rate) -m int ge 0",
        f"    acl {many} sc{number}_conn_cur,sub({name}_concurrent) -m int gt 0",
        f"    {refuse(429, f'Your {kind.value} sent too many requests in one second; try again.')} {retry} if {fast}",
        f"    {refuse(429, f'Your {kind.value} has too many requests open; try again.')} {retry} if {many}",
    ]


def _counter(kind: Limited) -> int:
    return int(Counter[kind.value])


def _table(kind: Limited) -> str:
    return f"{kind.value}s_counted"
