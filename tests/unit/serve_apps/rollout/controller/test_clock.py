"""A clock that is wrong for a moment ends no rollout."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, replace

from cluster.ledger import Ledger
from cluster.ledger.events import PolicyDecided, RolloutRolledBack
from serve_apps.rollout.controller.clock import LookClock, database_time
from serve_apps.rollout.controller.controller import CONFIRMING_LOOKS, Controller
from serve_apps.rollout.looks import EvidenceSource
from tests.samples.policies import EARLY, FAILING, EvidenceDouble, permitted, started_ledger

START = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
YEAR_S = 365 * 86_400


@dataclass
class FakeClock:
    """A machine's clock, which can be set, and its monotonic clock."""

    ran_s: float = 0.0
    set_by_s: float = 0.0

    def wall(self) -> dt.datetime:
        return START + dt.timedelta(seconds=self.ran_s + self.set_by_s)

    def monotonic(self) -> float:
        return self.ran_s

    def look_clock(self) -> LookClock:
        return LookClock(self.wall, monotonic=self.monotonic)


class Aging(EvidenceDouble):
    """Counts of too few units, whose rollout started at `START`."""

    def evidence(self, *arguments: object, now: dt.datetime, **others: object):  # type: ignore[no-untyped-def,override]
        self.counts = replace(self.counts, total_s=(now - START).total_seconds())
        return super().evidence(*arguments, now=now, **others)  # type: ignore[arg-type]


def acting(ledger: Ledger, clock: FakeClock, source: EvidenceSource) -> Controller:
    return Controller(ledger, source, refusal=permitted, clock=clock.look_clock())


def verdicts(ledger: Ledger) -> list[str]:
    return [str(entry.payload["verdict"]) for entry in ledger.entries(PolicyDecided)]


def test_look_is_skipped_when_the_clock_jumps() -> None:
    """Forward, back, or because the machine was suspended. The next look is none of a jump."""
    clock = FakeClock()
    looks = clock.look_clock()
    for ran_s, set_by_s, jumped in (
        *((0, 0, False), (1, 0, False), (61, 2, False)),
        *((62, YEAR_S, True), (63, YEAR_S, False), (64, 0, True), (65, -4, False)),
    ):
        clock.ran_s, clock.set_by_s = ran_s, set_by_s
        assert looks.now() == (None if jumped else clock.wall())


def test_clock_that_is_wrong_for_some_looks_ends_no_rollout(url: str) -> None:
    """A deadline counts after several looks in a row, and a jump begins again with the first."""
    ledger, clock = started_ledger(url), FakeClock()
    controller = acting(ledger, clock, Aging(EARLY))
    for set_by_s in [0, *[YEAR_S] * CONFIRMING_LOOKS, *[0] * 3, *[YEAR_S] * CONFIRMING_LOOKS]:
        clock.ran_s, clock.set_by_s = clock.ran_s + 1, set_by_s
        controller.check_once()
    assert verdicts(ledger) == ["continue"]
    clock.ran_s += 1
    controller.check_once()
    assert verdicts(ledger) == ["continue", "inconclusive"]


def test_harm_rolls_back_at_the_first_look(url: str) -> None:
    """It does not depend on the time."""
    ledger = started_ledger(url)
    acting(ledger, FakeClock(), EvidenceDouble(FAILING)).check_once()
    assert ledger.last(RolloutRolledBack) is not None


def test_time_is_that_of_the_database(url: str) -> None:
    """In UTC, as the ledger's."""
    before = dt.datetime.now(dt.UTC)
    now = database_time(Ledger(url).engine)
    assert before - dt.timedelta(seconds=1) < now < dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
