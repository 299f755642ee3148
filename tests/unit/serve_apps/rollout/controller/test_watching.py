"""After a promotion, the controller goes on judging, and takes the promotion back by itself."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import (
    AliasMoved,
    DeploymentRemoved,
    LedgerEvent,
    RolloutRolledBack,
    WatchDecided,
    WatchEnded,
)
from cluster.statistics.evidence import EventCounts, Evidence
from cluster.statistics.policy import UnitEvent
from serve_apps.edge.haproxy.routes import entry
from serve_apps.rollout.controller.controller import CONFIRMING_LOOKS
from serve_apps.rollout.history import History, read_history
from serve_apps.rollout.replay import replayed_lines
from serve_apps.rollout.serving_state import read_states
from tests.samples.policies import FAILING, HEALTHY
from tests.samples.rollouts import STARTED
from tests.samples.watches import ALL_FAILED, promoted_ledger

NOW = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC)
HELD = "m-v2|m-v1|predecessor|r-watch|s|100|9900"
WATCHED = "m-v2|m-v2|champion|r-watch|s|10000|10000"
AFTER = "m-v2|m-v2|champion|none|-|0|10000"
BACK = "m-v1|m-v1|champion|none|-|0|10000"


def split(ledger: Ledger) -> str | None:
    return entry(read_states(ledger)["m"])


def history(ledger: Ledger) -> History:
    return read_history(ledger, "m")


def types_since(ledger: Ledger, seq: int) -> list[str]:
    return [one.type for one in ledger.entries(after=seq)]


ROLLBACK = ["WatchDecided", "AliasMoved", "RolloutRolledBack", "WatchEnded", "VersionKeptWarm"]


@pytest.mark.parametrize(
    ("holdback", "counts", "during"), [(True, FAILING, HELD), (False, ALL_FAILED, WATCHED)]
)
def test_harm_after_the_promotion_rolls_back(url: str, holdback: bool, counts: Evidence, during: str) -> None:
    """One transaction makes the predecessor the champion again, so the edge's map changes once. It happens once."""
    ledger, acting, double = promoted_ledger(url, holdback=holdback)
    assert split(ledger) == during
    acting.check_once()
    seq, double.counts = ledger.head(), counts
    acting.check_once()
    acting.check_once()
    assert types_since(ledger, seq) == ROLLBACK
    assert split(ledger) == BACK
    assert (history(ledger).watch, history(ledger).promotion) == (None, None)
    assert "r-watch" not in double.counted()
    assert list(replayed_lines(ledger.entries()))[-2].endswith("m r: roll_back after the promotion")


def test_without_a_holdback_only_the_breaker_rolls_back(url: str) -> None:
    """The other tests compare two versions, and there is only one."""
    ledger, acting, _ = promoted_ledger(url, holdback=False, counts=FAILING)
    acting.check_once()
    assert split(ledger) == WATCHED
    decided = ledger.last(WatchDecided)
    assert decided is not None
    assert (decided.payload["verdict"], decided.payload["reasons"]) == ("continue", [])


def test_holdback_compares_arms_of_equal_size_in_windows_of_its_own(url: str) -> None:
    """It counts 1 % of the units in each arm. The windows go on after those of the rollout."""
    ledger, acting, double = promoted_ledger(url, holdback=True)
    acting.check_once()
    assert (double.asked[-1]["rollout"], double.asked[-1]["weight"]) == ("r-watch", 1.0)
    decided = ledger.last(WatchDecided)
    assert decided is not None
    assert decided.payload["evidence"]["window"] == 3
    assert "r-watch" in double.counted()


@pytest.mark.parametrize("event", [UnitEvent.refusal, UnitEvent.slow])
def test_only_events_with_a_guardrail_roll_back(url: str, event: UnitEvent) -> None:
    """As before the promotion."""
    counts = replace(HEALTHY, events={event: EventCounts(treatment=40)})
    ledger, acting, _ = promoted_ledger(url, holdback=True, counts=counts)
    acting.check_once()
    assert split(ledger) == HELD


def test_watch_ends_after_its_time(url: str) -> None:
    """Then all units get the champion, and nothing is judged any more."""
    times = [NOW]
    ledger, acting, double = promoted_ledger(url, holdback=True, clock=lambda: times[-1])
    times.append(NOW + dt.timedelta(hours=24, seconds=1))
    double.counts, seq = FAILING, ledger.head()
    for _ in range(2 * CONFIRMING_LOOKS):
        acting.check_once()
    assert types_since(ledger, seq) == ["WatchEnded", "DeploymentRemoved"]
    ended = ledger.last(WatchEnded)
    assert ended is not None
    assert (ended.payload["outcome"], split(ledger)) == ("over", AFTER)
    assert "r-watch" not in double.counted()


def test_clock_that_is_wrong_for_some_looks_ends_no_watch() -> None:
    """Neither does it remove a version whose time is not over."""
    times = [NOW]
    ledger, acting, _ = promoted_ledger("sqlite://", holdback=True, clock=lambda: times[-1])
    acting.check_once()
    seq, late = ledger.head(), NOW + dt.timedelta(days=365)
    for now in ([late] * (CONFIRMING_LOOKS - 1) + [NOW]) * 2:
        times.append(now)
        acting.check_once()
    assert types_since(ledger, seq) == []
    over = NOW + dt.timedelta(hours=24, seconds=1)
    for now in ([over] * CONFIRMING_LOOKS) + ([over] * (CONFIRMING_LOOKS - 1) + [NOW]) * 2:
        times.append(now)
        acting.check_once()
    assert types_since(ledger, seq) == ["WatchEnded"]


@pytest.mark.parametrize(
    ("event", "after"),
    [
        (replace(STARTED, rollout="r2", treatment_version=1, champion_version=2), "m-v2|m-v1|challenger|r2|"),
        (AliasMoved(name="m", alias="champion", version=1, previous=2, reason=""), BACK),
        (DeploymentRemoved(name="m", version=1, app="m-v1", reason=""), AFTER),
        (RolloutRolledBack(model="m", rollout="other", reason=""), HELD),
    ],
)
def test_operator_wins_over_a_watch(url: str, event: LedgerEvent, after: str) -> None:
    """A new rollout, another champion, or a removed predecessor ends it. The event of another rollout does not."""
    ledger, acting, double = promoted_ledger(url, holdback=True)
    acting.check_once()
    ledger.append(event, actor="ann")
    double.counts, seq = FAILING if after != HELD else HEALTHY, ledger.head()
    acting.check_once()
    assert (split(ledger) or "").startswith(after)
    assert ("r-watch" in double.counted()) is (after == HELD)
    assert types_since(ledger, seq) == []


def test_removed_predecessor_between_reading_and_appending_is_noticed(url: str) -> None:
    """The rollback is not appended, because it would leave the model without a version."""
    ledger, acting, double = promoted_ledger(url, holdback=True, counts=FAILING)
    removed = DeploymentRemoved(name="m", version=1, app="m-v1", reason="")
    double.before = lambda: ledger.append(removed, actor="ann") and None
    acting.check_once()
    assert split(ledger) == AFTER
