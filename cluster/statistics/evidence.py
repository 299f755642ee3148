"""What was counted when a verdict is given. A verdict depends on nothing else, so it can be computed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.statistics.breaker import LastRequests
from cluster.statistics.moments import Moments
from cluster.statistics.policy import UnitEvent
from cluster.statistics.sample_ratio import Split


@dataclass(frozen=True, kw_only=True, slots=True)
class EventCounts:
    """Units that had one event."""

    treatment: int = 0
    """Number of the treatment's units whose first event was in the current window."""
    control: int = 0
    watched: int = 0
    """Number of the treatment's watched units that had the event in the current step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricCounts:
    """Units that entered one metric in all steps so far."""

    treatment: Moments = field(default_factory=Moments)
    """Of a paired metric: the units' differences, treatment minus champion."""
    control: Moments = field(default_factory=Moments)
    """Of a paired metric: nothing."""
    splits: tuple[Split, ...] = ()
    """How these units divided over the arms, for each step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All counts of a rollout at one moment."""

    step: int
    """Position of the step in the policy, from 0."""
    window: int
    """Number of windows that ended before the current one. A window ends with its step, or after a day. The last
    window of the plan never ends."""
    step_s: float
    """Time since the step began, in seconds."""
    total_s: float
    """Time since the rollout began, in seconds."""
    idle_s: float = 0.0
    """Time since the last request of the arm that has waited longer, in seconds."""
    stored_units: int = 0
    """Greatest number of stored units of any kind in this step. It ends at the policy's `max_units`."""
    watched_units: int = 0
    """Number of the treatment's units in this step whose time `unit_watch_s` is over."""
    events: Mapping[UnitEvent, EventCounts] = field(default_factory=dict)
    metrics: Mapping[str, MetricCounts] = field(default_factory=dict)
    last: LastRequests = field(default_factory=LastRequests)
    signals: tuple[str, ...] = ()
    """Names of the signals that are out of their bounds, such as a segment or a drift."""
