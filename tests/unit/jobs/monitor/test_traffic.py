"""Anomalies of the traffic, against the same hours before."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

from cluster.records.edge_counts.refusals import HOUR
from jobs.monitor.log.index import HourCount
from jobs.monitor.traffic import as_json, hours_before, judge_traffic, unusual_hours, with_refusals

START = dt.datetime(2026, 1, 5)


def weeks(number: int, *, seed: int = 0) -> dict[str, HourCount]:
    """Return hours with Poisson volumes: a hundred requests at day, ten at night, and half of it at weekends."""
    draw = np.random.default_rng(seed)
    hours = {}
    for position in range(number * 7 * 24):
        time = START + dt.timedelta(hours=position)
        mean = (100 if 8 <= time.hour < 20 else 10) * (0.5 if time.weekday() > 4 else 1)
        requests = int(draw.poisson(mean))
        hours[time.strftime(HOUR)] = HourCount(
            requests=requests,
            refused=int(draw.binomial(requests, 0.01)),
            entities=requests,
            unseen=int(draw.binomial(requests, 0.05)),
        )
    return hours


def judge(hours: dict[str, HourCount]) -> dict[str, list[str]]:
    until = (dt.datetime.strptime(max(hours), HOUR) + dt.timedelta(hours=1, minutes=5)).replace(tzinfo=dt.UTC)
    return {
        kind: [hour for hour, measure in by_hour.items() if measure.alert]
        for kind, by_hour in judge_traffic(hours, until=until).items()
    }


def test_usual_traffic_gives_few_alerts() -> None:
    """Days, nights and weekends differ, and are no anomaly. Of ten weeks' hours, at most one in a hundred is one."""
    alerts = [hour for seed in range(10) for hours in judge(weeks(9, seed=seed)).values() for hour in hours]
    assert len(alerts) <= 3 * 10 * 168 * 0.01


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("requests", HourCount(requests=10, entities=10)),
        ("requests", HourCount(requests=300, entities=300, unseen=15)),
        ("refused", HourCount(requests=100, refused=30, entities=100, unseen=5)),
        ("unseen", HourCount(requests=100, entities=100, unseen=60)),
    ],
)
def test_an_unusual_hour_is_an_alert(kind: str, change: HourCount) -> None:
    """Too few or too many requests, refusals, and entities without features. Other kinds have no alert."""
    hours = weeks(9)
    hour = max(name for name in hours if name.endswith("T12"))
    monday = max(
        name for name in hours if name.endswith("T12") and dt.datetime.strptime(name, HOUR).weekday() == 0
    )
    hours[monday] = change
    assert hour >= monday
    assert [name for name, alerts in judge(hours).items() if monday in alerts] == [kind]


def test_results_have_only_the_unusual_hours() -> None:
    """As plain data."""
    hours = weeks(9)
    hours[max(hours)] = HourCount(requests=900, entities=900)
    until = (dt.datetime.strptime(max(hours), HOUR) + dt.timedelta(hours=1)).replace(tzinfo=dt.UTC)
    judged = as_json(judge_traffic(hours, until=until))
    assert len(judged["requests"]) == 168
    assert unusual_hours(judged)["requests"][max(hours)]["value"] == 900
    assert all(measure["alert"] for by_hour in unusual_hours(judged).values() for measure in by_hour.values())


def test_an_hour_without_requests_is_an_alert() -> None:
    """The log has no record of it."""
    hours = weeks(9)
    monday = max(
        name for name in hours if name.endswith("T12") and dt.datetime.strptime(name, HOUR).weekday() == 0
    )
    del hours[monday]
    assert monday in judge(hours)["requests"]


def test_the_same_hours_before_are_those_of_the_weekday_if_enough_are_known() -> None:
    """Else those of all days. With less than three days, nothing is judged."""
    hour = START + dt.timedelta(weeks=5)
    assert hours_before(hour, START) == [hour - dt.timedelta(weeks=number) for number in range(1, 6)]
    hour = START + dt.timedelta(days=9)
    assert hours_before(hour, START) == [hour - dt.timedelta(days=number) for number in range(1, 10)]
    assert hours_before(START + dt.timedelta(days=2), START) == []
    few = {START.strftime(HOUR): HourCount(requests=3)}
    assert judge(few) == {"requests": [], "refused": [], "unseen": []}


def test_requests_that_got_4xx_are_refusals() -> None:
    """The log has no record of them, also in an hour without any record. Before the log begins, they are left out."""
    first, second, third = (f"2026-01-05T0{hour}" for hour in (1, 2, 3))
    logged = {second: HourCount(requests=10, refused=1, entities=10)}
    assert with_refusals(logged, {first: 5, second: 2, third: 3}) == {
        second: HourCount(requests=12, refused=3, entities=10),
        third: HourCount(requests=3, refused=3),
    }
    assert with_refusals({}, {first: 5}) == {}
    usual = weeks(9)
    last = max(hour for hour in usual if hour.endswith("T12"))
    assert last in judge(with_refusals(usual, {last: 60}))["refused"]
