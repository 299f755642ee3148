"""Pushes to an aggregated view: events count at once, and online values equal offline values."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.security.keys.access import KeyAccess
from feature_jobs.store.catalog.specifications import apply
from feature_jobs.store.streaming.pushed_view import load_pushed_view
from feature_jobs.store.streaming.pusher import Pusher
from tests.projects.push import PushProject, payment, payments_view
from tests.projects.views import define
from tests.unit.feature_jobs.streaming import push_kills
from tests.unit.feature_jobs.streaming.push_kills import run_and_kill

KILLS = (push_kills.KILLS + 1) // 2


@pytest.fixture
def payments(open_project: Callable[..., PushProject]) -> PushProject:
    """A project with an aggregated view."""
    return open_project(payments_view())


HOURS = (7, 8, 9.5, 12, 20)
"""From one longest window before the end."""


def test_pushed_events_count_before_and_after_streaming(payments: PushProject) -> None:
    """This includes corrected, deleted and repeated events. Before the view is materialised, its values are missing."""
    payments.push(payment(1, 6, 5.0), payment(2, 6, 7.0), key="a")
    assert payments.served(7)[0]["income__amount_count_2h"] == [None, None]
    payments.stream().step()
    assert payments.served(7)[0]["income__amount_count_2h"] == [None, None]
    payments.materialise()
    assert payments.served(7)[0]["income__amount_sum_2h"] == [7.0, 5.0]
    late = {"created_timestamp": payment(0, 8)["event_timestamp"]}
    sent = [payment(1, 5, 6.0, **late), payment(2, 6, deleted=True, **late), payment(4, 7.5, 1.5)]
    for _ in range(2):
        payments.push(*sent, key="b")
        assert payments.served(7)[0]["income__amount_sum_2h"] == [7.0, 5.0]
        assert payments.served(8)[0]["income__amount_sum_5h"] == [1.5, 6.0]
    pushed = payments.served(*HOURS)
    payments.stream().step()
    assert payments.served(*HOURS) == payments.trained(*HOURS) == pushed
    payments.materialise()
    assert payments.served(*HOURS) == pushed


def test_view_with_new_windows_is_missing_until_materialised(payments: PushProject) -> None:
    """The old state may lack events for the new windows. A new event does not complete it."""
    payments.push(payment(2, 6, 7.0), key="a")
    payments.stream().step()
    payments.materialise()
    longer = replace(payments_view().aggregations[1], windows=[timedelta(hours=9)])
    changed = replace(payments_view(), aggregations=[longer])
    apply(define(changed), payments.ledger, actor="test")
    payments.view = load_pushed_view(payments.ledger, "income")
    payments.pusher = Pusher(payments.view, payments.places, payments.store, payments.log)
    payments.push(payment(4, 7, 1.0), key="b")
    assert payments.served(8) == [{"income__amount_sum_9h": [None, None]}]
    payments.stream().step()
    payments.materialise()
    assert payments.served(8) == payments.trained(8) == [{"income__amount_sum_9h": [8.0, None]}]


def test_killed_event_jobs_lose_and_duplicate_no_events(
    tmp_path: Path, access: KeyAccess, open_project: Callable[..., PushProject]
) -> None:
    """Killed at random points and repeated with the same keys: online values equal offline values."""
    draw, kills = random.Random(0), 0
    hours = [draw.randrange(8) for _ in range(6 * KILLS)]
    sent = [
        payment(draw.randrange(6), hour, float(number), deleted=draw.random() < 0.2)
        for number, hour in enumerate(hours)
    ]
    steps = ["stream", "stream", "materialise", "push again"]
    waiting: list[Any] = [{"key": "first", "rows": sent[:1]}, "stream", "materialise"]
    for number, event in enumerate(sent):
        push = {"key": f"k{number}", "rows": [event, sent[draw.randrange(len(sent))]]}
        step = draw.choice(steps)
        waiting += [push, push if step == "push again" else step]
    killing = random.Random()
    while waiting:
        kill_after_s = killing.uniform(0.0, 0.3) if kills < KILLS else None
        kills += kill_after_s is not None
        waiting = waiting[run_and_kill(tmp_path, access, waiting, kill_after_s, aggregated=True) :]
    assert kills == KILLS
    killed = open_project(payments_view())
    while killed.stream().step():
        pass
    assert killed.table().height == 2 * len(sent) + 1
    assert killed.served(*HOURS) == killed.trained(*HOURS)
