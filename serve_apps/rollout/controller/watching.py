"""What the controller appends after a look at a promotion: a pure function of the model's history and the counts.

As before the promotion, a decision is recorded if it says something new. A rollback is in the same transaction, and it
is the same single change of the edge's map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from cluster.ledger.events import LedgerEvent, WatchDecided, WatchEnded
from cluster.statistics.evidence import Evidence
from cluster.statistics.verdict import Decision, Verdict
from serve_apps.rollout import transitions
from serve_apps.rollout.assignment import watch_id
from serve_apps.rollout.controller.decisions import is_new
from serve_apps.rollout.history import History, PolicyRun, WatchRun
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.serving_state import ModelState


class WatchedModel(NamedTuple):
    """A model whose promoted version the controller goes on judging."""

    model: str
    history: History
    watch: WatchRun
    state: ModelState

    def end(self) -> list[LedgerEvent]:
        """Return the event that ends the watch, because its time is over."""
        hours = self.watch.watch_s / 3600
        ended = WatchEnded(
            model=self.model,
            rollout=self.watch.run.rollout,
            outcome="over",
            reason=f"no harm was proven in {hours:g} h after the promotion",
        )
        return [ended]

    def events_after(self, evidence: Evidence, decision: Decision) -> list[LedgerEvent]:
        """Return the events to append after a look; none if nothing is new."""
        changes: list[LedgerEvent] = []
        not_done = ""
        if decision.verdict is Verdict.roll_back:
            not_done = self._obstacle()
            changes = [] if not_done else self._rollback(decision)
        if not changes and not is_new(self.watch.last, decision, step=0, not_done=not_done):
            return []
        decided = WatchDecided(
            model=self.model,
            rollout=self.watch.run.rollout,
            starter=self.watch.run.subject,
            verdict=decision.verdict.value,
            reasons=list(decision.reasons),
            evidence=as_json(evidence),
            not_done=not_done,
        )
        return [decided, *changes]

    def _obstacle(self) -> str:
        """Return why the promotion cannot be taken back, or "" if it can."""
        predecessor = self.watch.predecessor
        return "" if predecessor in self.state.apps else f"version {predecessor} is not deployed"

    def _rollback(self, decision: Decision) -> list[LedgerEvent]:
        promotion = self.history.promotion
        assert promotion is not None, "A watch begins with a promotion, and ends with its rollback."
        reason = "; ".join(decision.reasons)
        return transitions.rollback_of_promotion(self.model, self.history, promotion, reason=reason)


class ComparedRun(NamedTuple):
    """A rollout whose metrics are compared."""

    model: str
    champion: int | None
    """The version that control gets."""
    run: PolicyRun


def compared_runs(histories: Mapping[str, History]) -> Iterator[ComparedRun]:
    """Yield the rollouts whose metrics are compared now. A holdback has an id of its own."""
    for model, history in histories.items():
        champion, run, watch = history.champion, history.run, history.watch
        if run is None and watch is not None and watch.holdback:
            run = replace(watch.run, rollout=watch_id(watch.run.rollout), started_at=watch.started_at)
            champion = watch.predecessor
        if run is not None and run.scoring:
            yield ComparedRun(model, champion, run)
