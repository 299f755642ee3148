"""Events of a shadow's units: what its copies had, and how many units had it.

A unit counts once, when its outcome window is over, with all its copies. The counts are stored in the transaction of
the cohort, so no unit counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from cluster.records.schema import COPY_REFUSED
from cluster.runtime import Task
from cluster.statistics.policy import UnitEvent
from serve_apps.rollout.evidence.cohorts import Answer, UnitRows
from serve_apps.rollout.evidence.metric_rules import ShadowRule
from serve_apps.rollout.evidence.metric_tables import ALL_UNITS
from serve_apps.rollout.evidence.scoring import Scorer


def count_events(units: Mapping[str, UnitRows], rule: ShadowRule, scorer: Scorer) -> Counter[str]:
    """Return how many units had each event in any of their copies, and the number of all units."""
    counts: Counter[str] = Counter({ALL_UNITS: len(units)})
    for unit in units.values():
        pairs = ((answer, unit.copies[answer.request_id]) for answer in unit.answers)
        found = {event.value for answer, copy in pairs for event in _events(answer, copy, rule, scorer)}
        counts.update(found)
    return counts


def _events(answer: Answer, copy: Answer, rule: ShadowRule, scorer: Scorer) -> Iterator[UnitEvent]:
    """Yield what one copy had."""
    if copy.fault:
        yield UnitEvent.refusal if copy.fault == COPY_REFUSED else UnitEvent.failure
        return
    if copy.took_ms > rule.slow_ms:
        yield UnitEvent.slow
    if _disagrees(answer, copy, rule, scorer):
        yield UnitEvent.disagreement


def _disagrees(answer: Answer, copy: Answer, rule: ShadowRule, scorer: Scorer) -> bool:
    """Return whether any row of two answers to the same request differs by more than the policy tolerates."""
    ours, theirs = copy.predictions, answer.predictions
    if len(ours) != len(theirs):
        return True
    pairs = zip(ours, theirs, strict=True)
    if scorer.signatures(answer.version).task is Task.regression:
        values = [(one.get("value"), other.get("value")) for one, other in pairs]
        return any(one is None or other is None or abs(one - other) > rule.tolerance for one, other in values)
    parse = scorer.parser(answer.version).parse
    return any(parse(one.get("label")) != parse(other.get("label")) for one, other in pairs)
