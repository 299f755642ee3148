"""The summary of a rollout with a policy, after its end: one event with steps, requests, effects, starter and decider.

The controller appends it at its next look, whoever ended the rollout, and before the counts are forgotten. So it delays
no rollback. After a kill, the next controller appends what is missing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import PolicyEnded, PolicyStarted, PolicySummarised
from cluster.statistics.effects_report import effects
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan
from serve_apps.rollout.history import PolicyRun
from serve_apps.rollout.json_form import as_json, from_json
from serve_apps.rollout.looks import EvidenceSource, decision_now


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedRollout:
    """A rollout that has ended, as the ledger has it."""

    ended: PolicyEnded
    decider: str
    ended_at: str
    started: PolicyStarted

    def run(self) -> PolicyRun:
        """Return the rollout as it was at its end."""
        return PolicyRun(
            rollout=self.ended.rollout,
            version=self.ended.version,
            policy=self.started.policy,
            plan=self.started.plan,
            slow_ms=self.started.slow_ms,
            scoring=self.started.scoring,
            starter=self.started.starter,
            started_at=self.ended.started_at,
            weight=self.ended.weight,
            step_started_at=str(self.ended.steps[-1]["at"]),
        )

    def steps(self) -> list[dict[str, Any]]:
        """Return the steps with the seconds that each took."""
        ends = [*(str(step["at"]) for step in self.ended.steps), self.ended_at]
        seconds = [(_time(end) - _time(start)).total_seconds() for start, end in pairwise(ends)]
        return [step | {"seconds": one} for step, one in zip(self.ended.steps, seconds, strict=True)]

    def summary(self, plan: Plan, evidence: Evidence, requests: Mapping[str, int]) -> PolicySummarised:
        """Return the event.

        Args:
            plan: The rollout's plan.
            evidence: The counts at its end.
            requests: Number of requests by arm.
        """
        return PolicySummarised(
            model=self.ended.model,
            rollout=self.ended.rollout,
            version=self.ended.version,
            policy=self.started.policy,
            outcome=self.ended.outcome,
            reason=self.ended.reason,
            starter=self.ended.starter,
            decider=self.decider,
            started_at=self.ended.started_at,
            ended_at=self.ended_at,
            steps=self.steps(),
            requests=dict(requests),
            effects=effects(plan, evidence),
            evidence=as_json(evidence),
        )


class Summaries:
    """Appends the summaries that are missing.

    Args:
        ledger: The ledger.
        source: The counts.
    """

    def __init__(self, ledger: Ledger, source: EvidenceSource) -> None:
        self._ledger = ledger
        self._source = source
        self._started: dict[str, PolicyStarted] = {}
        self._summarised: set[str] = set()
        self._read_until = 0

    def append(self, entry: Entry, *, actor: str) -> None:
        """Append the summary of a `PolicyEnded` event, unless it has one. Ends of older releases get none."""
        ended = entry.event()
        since = self._read()
        if not isinstance(ended, PolicyEnded) or not ended.steps or ended.rollout in self._summarised:
            return
        rollout = EndedRollout(
            ended=ended, decider=entry.actor, ended_at=entry.time, started=self._started[ended.rollout]
        )
        plan = from_json(Plan, rollout.started.plan)
        evidence, _ = decision_now(self._source, rollout.run(), plan, now=_time(entry.time))
        event = rollout.summary(plan, evidence, self._source.requests(ended.rollout))
        self._ledger.append_unless_changed(
            [event],
            actor=actor,
            since=since,
            types=lambda name: name == PolicySummarised.__name__,
            concerns=lambda other: other.payload["rollout"] == ended.rollout,
        )

    def _read(self) -> int:
        """Read the new events, and return the ledger's head before."""
        head = self._ledger.head()
        if head != self._read_until:
            for entry in self._ledger.entries(PolicyStarted, after=self._read_until):
                event = entry.event()
                assert isinstance(event, PolicyStarted)
                self._started[event.rollout] = event
            for entry in self._ledger.entries(PolicySummarised, after=self._read_until):
                self._summarised.add(str(entry.payload["rollout"]))
            self._read_until = head
        return head


def _time(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)
