"""What the monitoring results of several chunks say about the versions that serve.

One chunk out of its bounds is often chance. If k of the last n chunks are, the verdict is `hold`: an alert, and a
running rollout of the model waits. Estimates and drift never roll back, because only outcomes show harm. If the
realised quality is out of its bounds in k of n chunks for this version and for all others with outcomes, no rollback
helps: the verdict is `retrain`, and the schedule of the model with the trigger `drift` starts. If only this version is
worse, the guardrails on metrics roll it back, by the outcomes of a running rollout or of a holdback.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from prometheus_client import Gauge

from cluster.ledger import Ledger
from cluster.ledger.events import ModelMonitored, QualityJudged
from cluster.settings import SteadyStateConfig
from serve_apps.rollout.controller.decisions import kinds
from serve_apps.rollout.serving_state import States, read_states
from serve_apps.rollout.transitions import ACTOR

HOLD, RETRAIN, OK = "hold", "retrain", "ok"
_COLUMN_FIGURES = {"drift": "drift", "missing": "missing values", "unseen": "unseen values"}
"""Fields of a monitoring event with the alerting chunks of each input, and their names in reasons."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The figures of one chunk that are out of their bounds."""

    name: str
    alerts: frozenset[str]
    """Estimates and drifts out of their bounds."""
    has_outcomes: bool
    is_worse: bool
    """The realised quality is out of its bounds."""

    def merge(self, other: Chunk) -> Chunk:
        """Return what either of two variants of a version shows in a chunk."""
        return Chunk(
            name=self.name,
            alerts=self.alerts | other.alerts,
            has_outcomes=self.has_outcomes or other.has_outcomes,
            is_worse=self.is_worse or other.is_worse,
        )


def chunks_of(event: Mapping[str, Any]) -> list[Chunk]:
    """Return the chunks of a `ModelMonitored` event, from the oldest."""
    return [_chunk(event, name, event["periods"][name]) for name in sorted(event["periods"])]


def _chunk(event: Mapping[str, Any], name: str, period: Mapping[str, Any]) -> Chunk:
    alerts = {
        text
        for field, text in _COLUMN_FIGURES.items()
        if any(name in chunks for chunks in event.get(field, {}).values())
    }
    if name in event.get("reconstruction", ()):
        alerts.add("drift")
    if (period.get("estimate") or {}).get("alert"):
        alerts.add("estimated quality")
    realised = period.get("realisation")
    return Chunk(
        name=name,
        alerts=frozenset(alerts),
        has_outcomes=bool(realised),
        is_worse=bool(realised and realised["alert"]),
    )


def judge_chunks(
    model: str, version: int, chunks: Mapping[int, list[Chunk]], rule: SteadyStateConfig
) -> QualityJudged:
    """Return the verdict about a version.

    Args:
        model: Name of the model.
        version: A version that serves.
        chunks: The chunks of each monitored version.
        rule: How many of how many chunks are an alert.
    """
    last = chunks[version][-rule.chunks :]
    reasons = [
        f"{figure}: out of its bounds in {count} of {len(last)} chunks"
        for figure in sorted({figure for chunk in last for figure in chunk.alerts})
        if (count := sum(figure in chunk.alerts for chunk in last)) >= rule.alerts
    ]
    verdict = HOLD if reasons else OK
    if (worse := sum(chunk.is_worse for chunk in last)) >= rule.alerts:
        is_shared, compared = _compare([chunk.name for chunk in last], version, chunks, rule)
        verdict = RETRAIN if is_shared else HOLD
        reasons.append(f"realised quality: out of its bounds in {worse} of {len(last)} chunks, {compared}")
    return QualityJudged(
        model=model,
        version=version,
        verdict=verdict,
        reasons=reasons,
        chunks=[chunk.name for chunk in last],
        asks_for_labels=verdict == HOLD and not all(chunk.has_outcomes for chunk in last),
    )


def _compare(
    names: Collection[str], version: int, chunks: Mapping[int, list[Chunk]], rule: SteadyStateConfig
) -> tuple[bool, str]:
    """Return whether all other versions with outcomes in these chunks are worse, too, and that in words."""
    others = {
        other: sum(chunk.is_worse for chunk in known) >= rule.alerts
        for other, all_chunks in sorted(chunks.items())
        if other != version
        and len(known := [one for one in all_chunks if one.name in names and one.has_outcomes]) >= rule.alerts
    }
    if not others:
        return False, "and no other version has outcomes"
    better = [str(other) for other, is_worse in others.items() if not is_worse]
    if better:
        return False, f"but not for version {', '.join(better)}"
    return True, f"also for version {', '.join(map(str, others))}"


class SteadyState:
    """Judges the versions that serve, after each monitoring run.

    Args:
        ledger: The ledger.
        rule: How many of how many chunks are an alert.
        gauge: Is 1 for a version that is out of its bounds.
    """

    def __init__(self, ledger: Ledger, rule: SteadyStateConfig, gauge: Gauge) -> None:
        self._ledger = ledger
        self._rule = rule
        self._gauge = gauge
        self._read_until = 0
        self._monitored: dict[str, dict[tuple[int, str], list[Chunk]]] = {}
        self._last: dict[tuple[str, int], QualityJudged] = {}

    def check(self) -> None:
        """Read new results, and append what they say that is new. Without new events, it does nothing.

        Raises:
            SQLAlchemyError: The ledger does not answer. The next call reads the same results again.
        """
        since = self._ledger.head()
        if since == self._read_until:
            return
        after, self._read_until = self._read_until, since  # odd results are not read again
        try:
            self._judge_new(after, since=since)
        except sa.exc.DataError:  # an odd result, too
            raise
        except sa.exc.SQLAlchemyError:
            self._read_until = after
            raise

    def _judge_new(self, after: int, *, since: int) -> None:
        """Read the events after a `seq`, and judge the versions of their models."""
        changed = self._read(after)
        if not changed:
            return
        states = read_states(self._ledger)
        for model in changed:
            serving = _serving(states, model)
            self._clear_others(model, serving)
            for version in serving:
                self._judge(model, version, since=since)

    def signals(self, model: str, versions: Iterable[int]) -> tuple[str, ...]:
        """Return the names of what is out of its bounds, for a rollout of these versions."""
        judged = [self._last[model, version] for version in versions if (model, version) in self._last]
        texts = {
            f"{kind} of version {one.version}"
            for one in judged
            if one.verdict != OK
            for kind in kinds(one.reasons)
        }
        return tuple(sorted(texts))

    def _read(self, after: int) -> list[str]:
        """Read the events after a `seq`, and return the models with new monitoring results."""
        changed: dict[str, None] = {}
        for entry in self._ledger.entries(ModelMonitored, after=after):
            event = entry.payload
            by_variant = self._monitored.setdefault(str(event["model"]), {})
            by_variant[int(event["version"]), str(event["variant"])] = chunks_of(event)
            changed[str(event["model"])] = None
        for entry in self._ledger.entries(QualityJudged, after=after):
            judged = entry.event()
            assert isinstance(judged, QualityJudged)
            self._remember(judged)
        return list(changed)

    def _judge(self, model: str, version: int, *, since: int) -> None:
        chunks = _by_version(self._monitored[model])
        if not chunks.get(version):
            return
        judged = judge_chunks(model, version, chunks, self._rule)
        if not self._is_new(judged):
            return
        appended = self._ledger.append_unless_changed(
            [judged],
            actor=ACTOR,
            since=since,
            types=lambda name: name in (QualityJudged.__name__, ModelMonitored.__name__),
            concerns=lambda entry: (
                entry.payload["model"] == model
                and (entry.type != QualityJudged.__name__ or entry.payload["version"] == version)
            ),
        )
        if appended:
            self._remember(judged)

    def _clear_others(self, model: str, serving: Collection[int]) -> None:
        """End the alerts of a model's versions that do not serve any more."""
        for known, version in self._last:
            if known == model and version not in serving:
                self._gauge.labels(known, str(version)).set(0)

    def _is_new(self, judged: QualityJudged) -> bool:
        last = self._last.get((judged.model, judged.version))
        if last is None:
            return judged.verdict != OK
        return (last.verdict, kinds(last.reasons)) != (judged.verdict, kinds(judged.reasons))

    def _remember(self, judged: QualityJudged) -> None:
        self._last[judged.model, judged.version] = judged
        self._gauge.labels(judged.model, str(judged.version)).set(judged.verdict != OK)


def _by_version(monitored: Mapping[tuple[int, str], list[Chunk]]) -> dict[int, list[Chunk]]:
    """Return the chunks of each version, from the oldest. A version can have served under several variants."""
    merged: dict[int, dict[str, Chunk]] = {}
    for (version, _), chunks in monitored.items():
        known = merged.setdefault(version, {})
        for chunk in chunks:
            known[chunk.name] = known[chunk.name].merge(chunk) if chunk.name in known else chunk
    return {version: [known[name] for name in sorted(known)] for version, known in merged.items()}


def _serving(states: States, model: str) -> list[int]:
    """Return the champion and the running treatment of a model."""
    state = states.get(model)
    if state is None:
        return []
    treatment = None if state.rollout is None else state.rollout.treatment_version
    return [version for version in (state.champion_version, treatment) if version is not None]
