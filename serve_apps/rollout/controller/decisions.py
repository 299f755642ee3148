"""What the controller appends after a verdict: a pure function of the rollout's history and the counts.

A decision is recorded if the verdict, the step, the kinds of its reasons, or what is missing in kind differs from the
last one. The counts are those of that moment. The change that follows from it is in the same transaction.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cluster.ledger.events import LedgerEvent, PolicyDecided, RolloutWeightChanged
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.verdict import Decision, Verdict
from serve_apps.rollout import transitions
from serve_apps.rollout.capacity.scaling import NextStep
from serve_apps.rollout.history import LastDecision, PolicyRun
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.serving_state import Rollout

PAUSED = "paused"
ENDED = "an earlier verdict was inconclusive"


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One look at a rollout."""

    model: str
    champion: int | None
    rollout: Rollout
    run: PolicyRun
    plan: Plan
    evidence: Evidence
    decision: Decision


def kinds(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds of reasons, without their figures. The figures change every second."""
    return tuple(text.partition(":")[0] for text in texts)


def rests_on_time(decision: Decision) -> bool:
    """Return whether a decision could be the mistake of a clock, and not of the counts."""
    return not {"deadline", "no data"}.isdisjoint(kinds(decision.reasons))


def is_new(last: LastDecision | None, decision: Decision, *, step: int, not_done: str) -> bool:
    """Return whether a decision differs from the last recorded one, so that it must be recorded."""
    if last is None:
        return True
    before = (last.verdict, last.step, kinds(last.reasons), not last.missing, last.not_done)
    now = (decision.verdict.value, step, kinds(decision.reasons), not decision.missing, not_done)
    return before != now


def events_after(look: Look, *, refusal: Callable[[], str]) -> list[LedgerEvent]:
    """Return the events to append after a look; none if nothing is new.

    A rollback is never held up. All else waits while the rollout is paused, after an inconclusive verdict, or while the
    starter may not do it.

    Args:
        look: The look.
        refusal: Returns why the starter may not roll out the version, or "" if the starter may.
    """
    decision, run = look.decision, look.run
    changes = _changes(look)
    not_done = ""
    if changes and decision.verdict is not Verdict.roll_back:
        if run.is_inconclusive:
            not_done = ENDED
        elif run.is_paused:
            not_done = PAUSED
        else:
            not_done = refusal()
    if not_done:
        changes = []
    if not changes and not is_new(run.last, decision, step=look.evidence.step, not_done=not_done):
        return []
    decided = PolicyDecided(
        model=look.model,
        rollout=run.rollout,
        starter=run.subject,
        verdict=decision.verdict.value,
        reasons=list(decision.reasons),
        missing=list(decision.missing),
        evidence=as_json(look.evidence),
        not_done=not_done,
    )
    return [decided, *changes]


def next_step(look: Look) -> NextStep:
    """Return the step that a look leads to: the next weight, or the promotion."""
    is_promotion = look.decision.verdict is Verdict.promote
    steps, run = look.plan.policy.steps, look.run
    deadline = dt.timedelta(seconds=look.plan.policy.deadline_s)
    return NextStep(
        model=look.model,
        rollout=run.rollout,
        champion=look.champion,
        version=run.version,
        weight=100.0 if is_promotion else steps[look.evidence.step + 1].weight,
        ends_at=dt.datetime.fromisoformat(run.started_at) + deadline,
    )


def _changes(look: Look) -> list[LedgerEvent]:
    """Return the events that do what the verdict says, without the decision itself."""
    decision = look.decision
    run = replace(look.run, decisions=look.run.decisions + 1)
    match decision.verdict:
        case Verdict.roll_back:
            return transitions.rollback(_ending(look, run, "; ".join(decision.reasons)))
        case Verdict.passed:
            ending = _ending(look, run, "; ".join(decision.reasons))
            return transitions.rollback(ending, outcome="passed")
        case Verdict.promote:
            reason = f"rollout {run.rollout} of {run.subject}: {'; '.join(decision.reasons)}"
            return transitions.promotion(_ending(look, run, reason), champion=look.champion)
        case Verdict.advance if not decision.missing and look.evidence.step + 1 < len(look.plan.steps):
            following = look.plan.policy.steps[look.evidence.step + 1]
            return [RolloutWeightChanged(model=look.model, rollout=run.rollout, weight=following.weight)]
    return []


def _ending(look: Look, run: PolicyRun, reason: str) -> transitions.Ending:
    return transitions.Ending(model=look.model, rollout=look.rollout, run=run, reason=reason)
