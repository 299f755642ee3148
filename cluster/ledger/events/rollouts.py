"""Events of rollouts that follow a policy: its start, the controller's decisions, and its end.

None of them changes what is served. `RolloutWeightChanged`, `AliasMoved`, `RolloutPromoted` and `RolloutRolledBack` do
that, in the same transaction as the decision. So an older release serves such a rollout, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyStarted(LedgerEvent):
    """A rollout follows a policy from now on."""

    model: str
    rollout: str
    version: int
    policy: str
    """Name of the policy, such as `canary`; "" if it has none."""
    plan: dict[str, Json]
    """The `Plan` with the `Policy`: everything that the verdicts depend on, except the counts."""
    traffic: dict[str, Json]
    """The `Traffic` that the plan assumes."""
    slow_ms: float | None
    """An answer that takes longer counts as slow. None: only a client that gave up counts."""
    scoring: dict[str, Json]
    """How units are scored: `outcome_window_s`, `qualities` of means by metric, `squared_error_limit`, and `rules`,
    `segments` and `shadow` if there are any; {} if the logs are not needed."""
    starter: dict[str, Json]
    """The principal that started the rollout. The controller promotes only what this principal may promote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyDecided(LedgerEvent):
    """The controller reached another verdict, or the same verdict at another step or for other reasons."""

    model: str
    rollout: str
    starter: str
    """Subject of the principal that started the rollout."""
    verdict: str
    reasons: list[str]
    missing: list[str]
    """What is missing for the next step, or for the promotion."""
    evidence: dict[str, Json]
    """The `Evidence`: all counts. `serve_apps.rollout.replay` computes the verdict from them again."""
    not_done: str = ""
    """Why the controller did not do what the verdict says; "" if it did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyPaused(LedgerEvent):
    """The controller takes no step and promotes nothing until it is resumed. Guardrails still roll back."""

    model: str
    rollout: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyResumed(LedgerEvent):
    model: str
    rollout: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicasRequested(LedgerEvent):
    """The controller asks for at least so many replicas of a version. The end of the rollout ends it."""

    model: str
    rollout: str
    version: int
    replicas: int
    until: str
    """Time after which the request has no effect. After a promotion, the predecessor's lasts for the rollback window
    instead."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackJournaled(LedgerEvent):
    """A machine rolled back at its own edge while the ledger did not answer. It is appended when the ledger is back."""

    id: str
    """Id of the rollback in the machine's journal."""
    model: str
    rollout: str
    version: int
    """The version that lost its units."""
    fallback: int | None
    """The champion that got all units of this edge."""
    reasons: list[str]
    evidence: dict[str, Json]
    """The `Evidence` that the machine had."""
    decided_at: str
    """Time of the decision, of the machine's clock."""
    machine: str
    """Host name."""
    outcome: str
    """`applied`: the rollout is rolled back in the same transaction. `already_rolled_back`: it was. `conflict`: it was
    promoted meanwhile, and that stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyEnded(LedgerEvent):
    """Summary of a rollout that followed a policy."""

    model: str
    rollout: str
    version: int
    outcome: str
    """`promoted`, `rolled_back`, `aborted`, or of a shadow `passed`."""
    reason: str
    starter: str
    started_at: str
    """Time of the start, as the ledger has it."""
    weight: float
    """Weight at the end, in percent of units."""
    decisions: int
    """Number of the controller's decisions."""
    steps: list[dict[str, Json]] = field(default_factory=list)
    """Weight and start of each step. Older events lack it."""
