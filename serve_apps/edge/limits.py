"""`python -m serve_apps.edge.limits principal=alice requests_per_s=50`: set the limits of one principal or tenant.

`action=show` prints the limits that were set. If neither number is given, the defaults of `configs/edge.yaml` apply
again.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.ledger.events import EdgeLimitSet
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from serve_apps.edge.control.own_limits import read_own_limits
from serve_apps.edge.control.waiting import wait_until_applied
from serve_apps.edge.haproxy.request_limits import MAX_NAME_BYTES, Limit, Limited


class LimitAction(enum.Enum):
    """Action of the command."""

    set = "set"
    show = "show"


@dataclass(kw_only=True, slots=True)
class LimitsCommand(PlatformConfig):
    """The principal or tenant, and its limits."""

    action: LimitAction = LimitAction.set
    principal: str | None = None
    """A token's `sub`."""
    tenant: str | None = None
    requests_per_s: int | None = None
    concurrent: int | None = None
    """Largest number of requests that may be open at the same time."""

    def __post_init__(self) -> None:
        if self.action is LimitAction.show:
            return
        if (self.principal is None) == (self.tenant is None):
            raise ValueError("Name either a principal (`principal=…`) or a tenant (`tenant=…`).")
        if not 0 < len(self.name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"A {self.limited.value}'s name must have 1 to {MAX_NAME_BYTES} bytes.")
        Limit(requests_per_s=self.requests_per_s or 1, concurrent=self.concurrent or 1)
        if 0 in (self.requests_per_s, self.concurrent):
            raise ValueError("A limit must be at least 1. To block a principal, take its role away.")

    @property
    def limited(self) -> Limited:
        """Whether the limits are those of a principal or of a tenant."""
        return Limited.tenant if self.principal is None else Limited.principal

    @property
    def name(self) -> str:
        """Name of the principal or tenant."""
        return self.principal or self.tenant or ""


@job("limits", LimitsCommand)
def main(config: LimitsCommand) -> None:
    """Set limits, or show them."""
    if config.action is LimitAction.show:
        refuse_unused(("principal", "tenant", "requests_per_s", "concurrent"), by="action=show")
    record, ledger = require_running_cluster(config), open_ledger(config)
    actor = create_actor(config, record, ledger, entrypoint="serve_apps.edge.limits")
    edge = Resource(kind="edge", name="limits", region=config.cluster.region)
    match config.action:
        case LimitAction.show:
            actor.check(Action.read_metadata, edge)
        case LimitAction.set:
            actor.check(Action.manage_cluster, edge)
            event = EdgeLimitSet(
                limited=config.limited.value,
                name=config.name,
                requests_per_s=config.requests_per_s,
                concurrent=config.concurrent,
            )
            wait_until_applied(config, ledger, ledger.append(event, actor=actor.name).seq)
    own_limits = read_own_limits(ledger).set.values()
    print(json.dumps([event.payload() for event in own_limits], indent=1))


if __name__ == "__main__":
    main()
