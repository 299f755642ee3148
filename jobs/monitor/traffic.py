"""Anomalies of the traffic itself: request volume, refusals, and share of unseen entities, by hour.

An hour is compared with the same hours before: the same hour of the same weekday, in up to eight weeks. If fewer than
four such weeks are known, it is compared with the same hour of up to 28 days before, of which three must be known.

A volume is unusual if it is more than three standard deviations away from the mean of those hours. The variance is at
least the mean, as that of a Poisson process. A share is judged like a share of nulls (`calculation/thresholds.py`):
against the shares of those hours, and against the sampling error of an hour with as many requests.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from cluster.records.edge_counts.refusals import HOUR
from jobs.monitor.calculation.measures import Measure
from jobs.monitor.calculation.thresholds import ReferenceShares, compare_share
from jobs.monitor.log.index import HourCount

WEEKS, MIN_WEEKS, DAYS, MIN_DAYS = 8, 4, 28, 3
JUDGED_HOURS = 7 * 24
"""Number of newest hours that are judged. Older hours were judged by earlier runs."""


def judge_traffic(hours: Mapping[str, HourCount], *, until: dt.datetime) -> dict[str, dict[str, Measure]]:
    """Return `requests`, `refused` and `unseen` by hour, for the newest hours with enough hours before.

    Args:
        hours: Traffic by hour. An hour without any traffic may be missing.
        until: Time until which the log is complete. Its own hour is not over, so it is not judged.
    """
    judged: dict[str, dict[str, Measure]] = {"requests": {}, "refused": {}, "unseen": {}}
    if not hours:
        return judged
    first = dt.datetime.strptime(min(hours), HOUR)
    end = until.astimezone(dt.UTC).replace(tzinfo=None, minute=0, second=0, microsecond=0)
    start = max(first, end - dt.timedelta(hours=JUDGED_HOURS))
    while start < end:
        name, count = start.strftime(HOUR), _at(hours, start)
        before = [_at(hours, hour) for hour in hours_before(start, first)]
        if before:
            judged["requests"][name] = _judge_volume(count.requests, [one.requests for one in before])
            for kind, of, total in (("refused", "refused", "requests"), ("unseen", "unseen", "entities")):
                size = getattr(count, total)
                known = [one for one in before if getattr(one, total)]
                if size and known:
                    shares = np.array([getattr(one, of) / getattr(one, total) for one in known])
                    reference = ReferenceShares(
                        shares,
                        rows=sum(getattr(one, total) for one in known),
                        hits=sum(getattr(one, of) for one in known),
                    )
                    judged[kind][name] = compare_share(getattr(count, of) / size, size, reference)
        start += dt.timedelta(hours=1)
    return judged


def with_refusals(hours: Mapping[str, HourCount], refusals: Mapping[str, int]) -> dict[str, HourCount]:
    """Return the traffic of the log together with the requests that got 4xx. The log has no record of these.

    Refusals before the first hour of the log are left out, because it is not known what they are a share of.
    """
    first = min(hours, default="")
    total = dict(hours)
    for hour, number in refusals.items():
        if first and hour >= first:
            logged = total.get(hour, HourCount())
            total[hour] = replace(logged, requests=logged.requests + number, refused=logged.refused + number)
    return total


def hours_before(hour: dt.datetime, first: dt.datetime) -> list[dt.datetime]:
    """Return the hours that an hour is compared with, newest first. There are none if too few are known.

    Args:
        hour: The hour.
        first: First hour of the log.
    """
    for step, most, least in ((7, WEEKS, MIN_WEEKS), (1, DAYS, MIN_DAYS)):
        earlier = [hour - dt.timedelta(days=step * number) for number in range(1, most + 1)]
        known = [one for one in earlier if one >= first]
        if len(known) >= least:
            return known
    return []


def _at(hours: Mapping[str, HourCount], hour: dt.datetime) -> HourCount:
    return hours.get(hour.strftime(HOUR), HourCount())


def _judge_volume(requests: int, before: list[int]) -> Measure:
    mean = float(np.mean(before))
    deviation = float(np.sqrt(max(float(np.var(before, ddof=1)), mean, 1.0)))
    lower, upper = mean - 3 * deviation, mean + 3 * deviation
    return Measure(
        value=float(requests),
        lower=None,
        upper=None,
        lower_threshold=lower if lower > 0 else None,
        upper_threshold=upper,
        alert=requests > upper or requests < lower,
    )


def as_json(judged: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the measures as plain data."""
    return {
        kind: {hour: asdict(measure) for hour, measure in by_hour.items()} for kind, by_hour in judged.items()
    }


def unusual_hours(judged: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the hours with an alert, by kind. `judged` is plain data."""
    return {
        kind: {hour: measure for hour, measure in by_hour.items() if measure["alert"]}
        for kind, by_hour in judged.items()
    }
