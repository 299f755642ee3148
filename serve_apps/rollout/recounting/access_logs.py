"""Count the units of a rollout again from its access files, and compare the counts with a decision's.

A decision has the counts of its moment. The edges' readers may be some time behind then, so a recorded count must lie
between the counts of two moments: that of the decision, and one that is `lag_s` earlier. Within a window no count ever
falls, so these are its bounds. Counts of very many units may be older (`EvidenceStore`), so their lower bound is
earlier. With `max_units` stored units, no others are counted, so there is only an upper bound. Figures from outcomes
are not counted again: the logs of predictions and outcomes are encrypted, and a replay has no keys.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import ConfigError
from cluster.statistics.evidence import EventCounts, Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.policy import REQUEST_EVENTS
from serve_apps.rollout.assignment import Arm, bounds
from serve_apps.rollout.evidence.access_records import BrokenRecord, Request, parse
from serve_apps.rollout.evidence.store import current_window, valid_seconds

LAG_S = 10.0
"""Time that the readers may be behind, by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """A look at a rollout."""

    plan: Plan
    weight: float
    started_at: dt.datetime
    step_started_at: dt.datetime
    evidence: Evidence

    @property
    def now(self) -> dt.datetime:
        return self.started_at + dt.timedelta(seconds=self.evidence.total_s)


@dataclass(kw_only=True, slots=True)
class _Counter:
    """The counts of one rollout up to a time. It mostly moves forward; after an earlier time they begin again."""

    requests: list[Request]
    """In the order of their end."""
    slow_ms: float
    position: int = 0
    until_ms: int = 0
    events: dict[tuple[str, str], tuple[str, int, int]] = field(default_factory=dict)
    """Arm, `below` and time of a unit's last event, by event and unit."""
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    """`below` and time of the first request of each unit of the treatment at its greatest weight."""

    def advance(self, until_ms: int) -> None:
        """Count the requests that ended until a time."""
        if until_ms < self.until_ms:
            self.position = 0
            self.events.clear()
            self.units.clear()
        self.until_ms = until_ms
        while self.position < len(self.requests) and self.requests[self.position].ended_ms <= until_ms:
            self._add(self.requests[self.position])
            self.position += 1

    def _add(self, request: Request) -> None:
        event = request.event(self.slow_ms)
        if event is not None:
            key = (event.value, request.unit)
            arm, below, last_ms = self.events.get(key, (request.arm, 0, 0))
            self.events[key] = (arm, *max((below, last_ms), (request.below, request.ended_ms)))
        if request.arm == Arm.treatment and request.below > self.units.get(request.unit, (0, 0))[0]:
            self.units[request.unit] = (request.below, request.ended_ms)

    def counts(self, moment: Moment, *, age_ms: int = 0) -> dict[str, int]:
        """Return all counts of units, by their name in the evidence, if they were counted `age_ms` before the look."""
        plan, evidence = moment.plan, moment.evidence
        weight = moment.weight if 0 < moment.weight <= 50 else plan.policy.steps[evidence.step].weight
        below = bounds(weight).treatment_below
        window = current_window(
            plan,
            step=evidence.step,
            step_started_at=moment.step_started_at,
            started_at=moment.started_at,
            now=moment.now,
        )
        since_ms = _ms(window.since) if window.since > moment.step_started_at else 0
        watched_ms = _ms(moment.now) - age_ms - round(plan.policy.unit_watch_s * 1000)
        watched = {unit for unit, (at, first) in self.units.items() if at == below and first <= watched_ms}
        found = {"watched_units": len(watched)}
        found |= {f"events.{event}.{part}": 0 for event in REQUEST_EVENTS for part in _PARTS}
        for (event, unit), (arm, at, last_ms) in self.events.items():
            if at == below and last_ms >= since_ms:
                found[f"events.{event}.{arm}"] += 1
            if at == below and arm == Arm.treatment and unit in watched:
                found[f"events.{event}.watched"] += 1
        return found


_PARTS = ("treatment", "control", "watched")


class AccessLogs:
    """The access files of all edges.

    Args:
        folder: Folder with the files, of one edge or with a folder for each.
        lag_s: Time that a reader may have been behind, in seconds.

    Raises:
        ConfigError: The folder has no access file.
    """

    def __init__(self, folder: Path, *, lag_s: float) -> None:
        self._lag_ms = round(lag_s * 1000)
        self._requests: dict[str, list[Request]] = {}
        self._counters: dict[str, tuple[_Counter, _Counter]] = {}
        files = sorted(folder.rglob("*.jsonl"))
        if not files:
            raise ConfigError(f"{folder} has no access file (*.jsonl).")
        for request in _requests(files):
            self._requests.setdefault(request.rollout, []).append(request)
        for requests in self._requests.values():
            requests.sort(key=lambda request: request.ended_ms)

    def start(self, rollout: str, *, slow_ms: float | None) -> None:
        """Begin to count a rollout."""
        limit, requests = float("inf") if slow_ms is None else slow_ms, self._requests.get(rollout, [])
        self._counters[rollout] = (
            _Counter(requests=requests, slow_ms=limit),
            _Counter(requests=requests, slow_ms=limit),
        )

    def first_difference(self, rollout: str, moment: Moment) -> tuple[str, int, str] | None:
        """Return the name of the first count that differs, its recorded value, and what the logs give.

        Moments of one rollout must come in the order of time. A shadow has no units in access records.
        """
        if moment.plan.policy.is_shadow:
            return None
        earlier, later = self._counters[rollout]
        recorded = _recorded(moment.evidence)
        age_ms = _age_ms(recorded)
        earlier.advance(_ms(moment.now) - self._lag_ms - age_ms)
        later.advance(_ms(moment.now))
        least, most = earlier.counts(moment, age_ms=age_ms), later.counts(moment)
        if moment.evidence.stored_units >= moment.plan.policy.max_units:
            least = dict.fromkeys(least, 0)
        for name, value in recorded.items():
            if not least[name] <= value <= most[name]:
                span = f"{least[name]}" if least[name] == most[name] else f"{least[name]} to {most[name]}"
                return name, value, span
        return None


def _requests(files: list[Path]) -> Iterator[Request]:
    """Yield the requests of both arms of all rollouts. Broken lines are no evidence."""
    for path in files:
        with path.open("rb") as file:
            for line in file:
                try:
                    request = parse(line)
                except BrokenRecord:
                    continue
                if request is not None and request.is_in_experiment:
                    yield request


def _recorded(evidence: Evidence) -> dict[str, int]:
    """Return a decision's counts of units, by name."""
    found = {"watched_units": evidence.watched_units}
    for event in REQUEST_EVENTS:
        counts = evidence.events.get(event, EventCounts())
        found |= {f"events.{event}.{part}": getattr(counts, part) for part in _PARTS}
    return found


def _age_ms(recorded: Mapping[str, int]) -> int:
    """Return how old recorded counts may have been at their look."""
    rows = sum(number for name, number in recorded.items() if not name.endswith(".watched"))
    return math.ceil(valid_seconds(rows) * 1000)


def _ms(time: dt.datetime) -> int:
    return round(time.timestamp() * 1000)
