"""How fast each principal and each tenant may ask, and how much at once: ledger events folded into HAProxy's maps, and
the rules that hold requests to them.

Requests that were let through are counted over a sliding second, so who asks twice too fast is answered half of the
time, not never. Counts are this edge's own: with N edges a limit holds N times. They survive a reload, because the
outgoing worker teaches the new one as its peer; requests that it still answers do not count as concurrent in the new.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import quote

from cluster.ledger.events import EdgeLimitSet, LedgerEvent, Subject, require_known
from serve_apps.edge.haproxy.answers import refuse

MAX_NAME_BYTES = 200
"""Of a principal or a tenant, as long as a token's claim may be."""
NAMELESS = "-"
"""All whose subject HAProxy cannot read, as JSON escapes beyond Latin-1 are, share one count."""
_IDLE = "1m"
_MAX_COUNTED = "100k"


class Limited(enum.Enum):
    """Whom a limit is for."""

    principal = "principal"
    tenant = "tenant"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What one may ask for."""

    requests_per_s: int
    concurrent: int
    """Requests that are being answered at one time."""

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if not 1 <= value < 2**31:
                raise ValueError(f"A limit's {part.name} must be at least 1 and below 2^31, got {value}.")

    def entry(self) -> str:
        """As a map has it."""
        return f"{self.requests_per_s}|{self.concurrent}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What holds for everybody without a limit of his own, and where those of the others are."""

    principal: Limit
    tenant: Limit
    folder: str
    """Of the two map files."""
    socket: str
    """Where the workers before and after a reload meet, in a folder of nobody else's."""

    def of(self, limited: Limited) -> Limit:
        return self.principal if limited is Limited.principal else self.tenant

    def file(self, limited: Limited) -> Path:
        """The map of those with a limit of their own."""
        return Path(self.folder) / f"{limited.value}-limits.map"


@dataclass(frozen=True, slots=True)
class OwnLimits:
    """Principals and tenants with limits of their own, as the ledger says."""

    set: Mapping[tuple[Limited, str], EdgeLimitSet] = field(default_factory=dict)

    def apply(self, event: LedgerEvent) -> OwnLimits:
        """The limits after one more event; events of other kinds change nothing.

        Raises:
            ReleaseTooOld: an event of a newer release that changes limits.
        """
        require_known(event, Subject.limit)
        if not isinstance(event, EdgeLimitSet) or event.limited not in Limited.__members__:
            return self
        key = (Limited(event.limited), event.name)
        others = {name: own for name, own in self.set.items() if name != key}
        ended = event.requests_per_s is None and event.concurrent is None
        return OwnLimits(others if ended else others | {key: event})

    def limit(self, limited: Limited, name: str, default: Limit) -> Limit:
        """What holds for one; where an own limit leaves a part open, the default's."""
        own = self.set.get((limited, name))
        if own is None:
            return default
        return Limit(
            requests_per_s=default.requests_per_s if own.requests_per_s is None else own.requests_per_s,
            concurrent=default.concurrent if own.concurrent is None else own.concurrent,
        )

    def entries(self, limited: Limited, default: Limit) -> dict[str, str]:
        """The map of one kind; a name's letters that a map's line could not hold are escaped, as `url_enc` does."""
        names = sorted(name for kind, name in self.set if kind is limited)
        return {quote(name, safe=""): self.limit(limited, name, default).entry() for name in names}


def tables(limits: Limits) -> str:
    """The sections that count."""
    stored = "store gpc0,gpc0_rate(1s),conn_cur"
    counted = "\n".join(
        f"backend {_table(kind)}\n    stick-table type string len {MAX_NAME_BYTES} size {_MAX_COUNTED} "
        f"expire {_IDLE} peers edge {stored}\n"
        for kind in Limited
    )
    return f"peers edge\n    peer edge unix@{limits.socket}\n\n{counted}"


def rules(limits: Limits, *, tenant: str) -> str:
    """Rules that refuse with 429 who asks too fast or for too much at once, and count the others.

    Args:
        limits: everybody's.
        tenant: whose a token is that names none.
    """
    lines = [
        f"    http-request set-var(txn.principal) str({NAMELESS}) unless {{ var(txn.principal) -m len gt 0 }}",
        f"    http-request set-var(txn.tenant) str({tenant}) unless {{ var(txn.tenant) -m found }}",
        *(line for number, kind in enumerate(Limited) for line in _held(kind, number, limits)),
        *(f"    http-request sc-inc-gpc0({number})" for number, _ in enumerate(Limited)),
    ]
    return "\n".join(lines)


def _held(kind: Limited, number: int, limits: Limits) -> list[str]:
    name, default = f"txn.{kind.value}", limits.of(kind).entry()
    own = f"url_enc,map_str({limits.file(kind)},{default})"
    fast, much = f"{kind.value}_too_fast", f"{kind.value}_too_much"
    retry = "hdr retry-after 1"
    return [
        f"    http-request track-sc{number} var({name}) table {_table(kind)}",
        f"    http-request set-var({name}_limit) var({name}),{own}",
        f"    http-request set-var({name}_rate) var({name}_limit),field(1,|)",
        f"    http-request set-var({name}_concurrent) var({name}_limit),field(2,|)",
        f"    acl {fast} sc{number}_gpc0_rate,sub({name}_rate) -m int ge 0",
        f"    acl {much} sc{number}_conn_cur,sub({name}_concurrent) -m int gt 0",
        f"    {refuse(429, f'Your {kind.value} has asked too often within a second; try again.')} {retry} if {fast}",
        f"    {refuse(429, f'Your {kind.value} has too many requests open; try again.')} {retry} if {much}",
    ]


def _table(kind: Limited) -> str:
    return f"{kind.value}s_counted"
