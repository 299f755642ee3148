"""Options of the rollout command, and which action uses which options."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from cluster.records.schema import SHADOW
from cluster.settings import PlatformConfig
from serve_apps.rollout.assignment import RESERVED_VARIANTS, require_percent, require_variant
from serve_apps.rollout.policy.spec import RolloutSpec


class RolloutAction(enum.Enum):
    """Action of the command."""

    plan = "plan"
    start = "start"
    weight = "weight"
    show = "show"
    promote = "promote"
    rollback = "rollback"
    pause = "pause"
    resume = "resume"
    abort = "abort"
    check = "check"
    shadow = "shadow"
    compare = "compare"
    stop_shadow = "stop_shadow"


@dataclass(kw_only=True, slots=True)
class RolloutConfig(PlatformConfig):
    """Options of the command; see `configs/rollout.yaml`."""

    action: RolloutAction = RolloutAction.show
    name: str = "???"
    """Name of the model."""
    rollout: RolloutSpec | None = None
    """Policy of the rollout: `rollout=<name>` selects `configs/rollout/<name>.yaml`."""
    version: str = "latest"
    """Version for treatment or shadow: a number, an alias, or `latest`. `promote` accepts only the treatment."""
    weight: float = 10.0
    """Percent of units that the treatment answers."""
    share: float = 10.0
    """Percent of requests that are copied to a shadow."""
    variant: str = "challenger"
    """Name of the treatment in answers and logs."""
    reason: str = "by command"
    """Reason that the ledger records."""
    min_outcomes: int = 200
    """Number of outcomes that each arm needs for a verdict of the guardrail."""
    max_drop: float = 0.05
    """How far the treatment's metric may be below the control's metric."""
    rollback_window_h: float | None = None
    """Hours after a promotion in which `rollback` takes it back. Null: as long as the predecessor stays deployed, which
    is the policy's `watch_s`, or 24 hours without a policy."""
    output: str | None = None
    """File to write the result to, as JSON."""

    def __post_init__(self) -> None:
        for name in ("weight", "share"):
            require_percent(getattr(self, name), name=name)
        require_variant(self.variant)
        if self.variant in (*RESERVED_VARIANTS, SHADOW):
            raise ValueError(f"variant '{self.variant}' is a reserved name in records. Choose another name.")
        if self.rollback_window_h is not None and not 0 <= self.rollback_window_h < math.inf:
            raise ValueError(f"rollback_window_h must be at least 0, got {self.rollback_window_h}.")
        if self.min_outcomes < 1:
            raise ValueError(f"min_outcomes must be at least 1, got {self.min_outcomes}.")
        if not 0 <= self.max_drop < math.inf:
            raise ValueError(f"max_drop must be a finite number of at least 0, got {self.max_drop}.")


OWN_OPTIONS = frozenset(
    {
        *("version", "weight", "share", "variant", "reason", "min_outcomes", "max_drop"),
        *("rollout", "rollback_window_h"),
    }
)
_GUARDRAIL = frozenset({"min_outcomes", "max_drop"})
USED: dict[RolloutAction, frozenset[str]] = {
    RolloutAction.plan: frozenset({"rollout"}),
    RolloutAction.start: frozenset({"version", "weight", "variant", "rollout"}),
    RolloutAction.weight: frozenset({"weight"}),
    RolloutAction.show: frozenset(),
    RolloutAction.promote: frozenset({"version", "reason"}) | _GUARDRAIL,
    RolloutAction.rollback: frozenset({"reason", "rollback_window_h"}),
    RolloutAction.pause: frozenset({"reason"}),
    RolloutAction.resume: frozenset({"reason"}),
    RolloutAction.abort: frozenset({"reason"}),
    RolloutAction.check: _GUARDRAIL,
    RolloutAction.shadow: frozenset({"version", "share"}),
    RolloutAction.compare: frozenset(),
    RolloutAction.stop_shadow: frozenset({"reason"}),
}
"""Options that an action uses."""
