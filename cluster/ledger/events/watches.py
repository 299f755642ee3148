"""Events of the time after a rollout: the watch of a promotion, versions that stay deployed, and the summary.

None of these types has a prefix of `Subject.serving`. An older release ignores them. Then it sends all units to the
champion, which is safe.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchStarted(LedgerEvent):
    """The controller goes on judging a version after its promotion. It is in the transaction of the promotion."""

    model: str
    rollout: str
    version: int
    """The promoted version."""
    predecessor: int
    """The champion before it. A rollback makes it the champion again."""
    salt: str
    """Salt of the rollout, so that no unit changes its bucket."""
    holdback: bool
    """Whether the buckets 9900-9999 keep the predecessor."""
    watch_s: float
    unit: str = "header"
    """What names the unit of a request, as in the rollout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchDecided(LedgerEvent):
    """The controller reached another verdict about a promoted version, or the same verdict for other reasons."""

    model: str
    rollout: str
    starter: str
    verdict: str
    reasons: list[str]
    evidence: dict[str, Json]
    """The `Evidence`: all counts. `serve_apps.rollout.replay` computes the verdict from them again."""
    not_done: str = ""
    """Why the controller did not do what the verdict says; "" if it did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchEnded(LedgerEvent):
    """The controller does not judge the promoted version any more. All units get the champion."""

    model: str
    rollout: str
    outcome: str
    """`over` or `rolled_back`."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityJudged(LedgerEvent):
    """Monitoring results of several chunks say something new about a version that serves."""

    model: str
    version: int
    verdict: str
    """`hold`: figures are out of their bounds. `retrain`: the realised quality of all versions is. `ok`: none is any
    more."""
    reasons: list[str]
    chunks: list[str]
    """The chunks that were judged, from the oldest."""
    asks_for_labels: bool
    """Whether outcomes are missing that would show if there is harm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionKeptWarm(LedgerEvent):
    """A version that a rollout took out of use stays deployed for a time. Then the controller ends its application."""

    model: str
    rollout: str
    version: int
    window_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplicationEnded(LedgerEvent):
    """The Serve application of a removed version has ended, so it uses no CPU, GPU or memory any more."""

    model: str
    version: int
    app: str
    removed_seq: int
    """The `DeploymentRemoved` event that this finishes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySummarised(LedgerEvent):
    """Summary of a rollout that followed a policy and has ended, with the effects at its end."""

    model: str
    rollout: str
    version: int
    policy: str
    outcome: str
    reason: str
    starter: str
    decider: str
    """Who ended the rollout: the controller (`system:rollouts`) or an operator."""
    started_at: str
    ended_at: str
    steps: list[dict[str, Json]]
    """`weight`, `at` and `seconds` of each step."""
    requests: dict[str, int]
    """Number of requests by arm; `none` has those without a unit."""
    effects: list[dict[str, Json]]
    """Each goal and guardrail: `kind`, `name`, `treatment`, `control`, `estimate`, `low`, `high`, `units`."""
    evidence: dict[str, Json] = field(default_factory=dict)
    """The counts that the effects come from."""
