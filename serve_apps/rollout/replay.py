"""`python -m serve_apps.rollout.replay --file export.jsonl`: compute each decision of the controller again.

It needs no cluster. It verifies the hash chain of the export, computes each verdict from the recorded counts, and
checks that the controller's changes are those that the verdicts allow. With `--logs FOLDER`, it also counts the units
of each decision again, from the access files of all edges. At the first difference it exits with 2 and names the event.
"""

from __future__ import annotations

import argparse
import datetime as dt
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, LedgerCorrupt, RefusedError, RolloutError
from cluster.ledger.chain import Entry, read_lines, verify_chain
from cluster.ledger.events import (
    AliasMoved,
    PolicyDecided,
    PolicyPaused,
    PolicyResumed,
    PolicyStarted,
    RollbackJournaled,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutStarted,
    RolloutWeightChanged,
    WatchDecided,
    WatchStarted,
)
from cluster.registry import CHAMPION
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan, Traffic, plan
from cluster.statistics.verdict import Decision, Verdict, find_harm, judge
from cluster.statistics.watch import judge_watch
from serve_apps.rollout.controller.decisions import ENDED, PAUSED, kinds
from serve_apps.rollout.history import step_at
from serve_apps.rollout.json_form import as_json, from_json
from serve_apps.rollout.outage.settling import APPLIED
from serve_apps.rollout.recounting.access_logs import LAG_S, AccessLogs, Moment
from serve_apps.rollout.recounting.figures import first_other_figure
from serve_apps.rollout.transitions import ACTOR

_TOLERANCE = 1e-6
"""Relative difference of a plan's numbers that another release of SciPy may cause."""
_Change = AliasMoved | RolloutWeightChanged | RolloutPromoted | RolloutRolledBack
"""What the controller does after a decision."""


_CHANGES: dict[Verdict, tuple[str, ...]] = {
    Verdict.roll_back: ("RolloutRolledBack",),
    Verdict.passed: ("RolloutRolledBack",),
    Verdict.promote: ("AliasMoved", "RolloutPromoted"),
    Verdict.advance: ("RolloutWeightChanged",),
}
"""Types of the events that follow a decision in its transaction, by verdict."""


@dataclass(kw_only=True, slots=True)
class _Replayed:
    """One rollout during the replay."""

    plan: Plan
    version: int
    weight: float
    started_at: dt.datetime
    step_started_at: dt.datetime
    predecessor: int = 0
    """The champion before the promotion, while the controller judges the promoted version."""
    is_paused: bool = False
    is_inconclusive: bool = False

    @property
    def step(self) -> int:
        """The step of the current weight."""
        return step_at([one.weight for one in self.plan.steps], self.weight)

    def changes(self, decision: Decision) -> tuple[str, ...]:
        """Return the types of the events that do what a decision says."""
        if decision.verdict is Verdict.advance and (
            decision.missing or self.step + 1 == len(self.plan.steps)
        ):
            return ()
        return _CHANGES.get(decision.verdict, ())


@dataclass(kw_only=True, slots=True)
class _Pending:
    """Changes that must follow a decision at once, because they are in its transaction."""

    decided: Entry
    model: str
    rollout: str
    types: tuple[str, ...]
    version: int
    """The version that becomes the champion, if one does."""


@dataclass(kw_only=True, slots=True)
class Replay:
    """Computes the decisions of all rollouts again, in the order of the ledger."""

    rollouts: dict[str, _Replayed] = field(default_factory=dict)
    started: dict[str, tuple[RolloutStarted, dt.datetime]] = field(default_factory=dict)
    logs: AccessLogs | None = None
    """The access files to count again, if there are any."""
    pending: _Pending | None = None
    decisions: int = 0

    def add(self, entry: Entry) -> str | None:
        """Compute an event again, and return a line about it, or None for other events.

        Raises:
            RolloutError: The event differs from what its counts give. The message names its `seq`.
        """
        event = entry.event()
        if entry.actor == ACTOR and isinstance(event, _Change):
            self._require_allowed(entry, event)
        else:
            self.require_done()
        match event:
            case RolloutStarted():
                self.started[event.rollout] = event, dt.datetime.fromisoformat(entry.time)
            case PolicyStarted():
                return self._start(entry, event)
            case PolicyDecided():
                self._decide(entry, event)
                return f"{entry.seq} {event.model} {event.rollout}: {event.verdict}"
            case RollbackJournaled():
                self._check_journaled(entry, event)
                return f"{entry.seq} {event.model} {event.rollout}: rolled back without the ledger"
            case WatchStarted() if event.rollout in self.rollouts:
                self.rollouts[event.rollout].predecessor = event.predecessor
            case WatchDecided():
                self._decide_watch(entry, event)
                return f"{entry.seq} {event.model} {event.rollout}: {event.verdict} after the promotion"
            case PolicyPaused() | PolicyResumed() if event.rollout in self.rollouts:
                self.rollouts[event.rollout].is_paused = isinstance(event, PolicyPaused)
            case RolloutWeightChanged() if event.rollout in self.rollouts:
                replayed = self.rollouts[event.rollout]
                replayed.weight = event.weight
                replayed.step_started_at = dt.datetime.fromisoformat(entry.time)
        return None

    def require_done(self) -> None:
        """Require that the last decision's change was made. Call it also after the last event.

        Raises:
            RolloutError: It was not.
        """
        if self.pending is not None:
            raise _difference(self.pending.decided, "change", "missing", self.pending.types[0])

    def _start(self, entry: Entry, event: PolicyStarted) -> str:
        stored = from_json(Plan, event.plan)
        try:
            computed = plan(stored.policy, from_json(Traffic, event.traffic))
        except RolloutError as error:
            raise RolloutError(
                f"Event {entry.seq} ({entry.type}) differs: its policy has no plan. {error}"
            ) from error
        _require_equal(entry, "plan", as_json(stored), as_json(computed))
        started, at = self.started[event.rollout]
        if event.version != started.treatment_version:
            raise _difference(entry, "version", event.version, started.treatment_version, by="it must be")
        self.rollouts[event.rollout] = _Replayed(
            plan=stored, version=event.version, weight=started.weight, started_at=at, step_started_at=at
        )
        if self.logs is not None:
            self.logs.start(event.rollout, slow_ms=event.slow_ms)
        return f"{entry.seq} {event.model} {event.rollout}: plan of {len(stored.steps)} steps"

    def _decide(self, entry: Entry, event: PolicyDecided) -> None:
        replayed = self._rollout(entry, event.rollout)
        evidence = from_json(Evidence, event.evidence)
        if entry.actor != ACTOR:
            raise _difference(entry, "actor", entry.actor, ACTOR, by="it must be")
        if evidence.step != replayed.step:
            raise _difference(
                entry, "step", evidence.step, replayed.step, by=f"the weight {replayed.weight:g} gives"
            )
        decision = judge(replayed.plan, evidence)
        missing = list(kinds(decision.missing))
        _require_decision(entry, event, decision, missing=(list(kinds(event.missing)), missing))
        _require_figures(entry, (*event.reasons, *event.missing), (*decision.reasons, *decision.missing))
        self._require_counted(entry, event.rollout, evidence)
        changes = replayed.changes(decision)
        _require_not_done(entry, event.not_done, replayed, decision, changes)
        if changes and not event.not_done:
            self.pending = _Pending(
                decided=entry,
                model=event.model,
                rollout=event.rollout,
                types=changes,
                version=replayed.version,
            )
        replayed.is_inconclusive |= decision.verdict is Verdict.inconclusive
        self.decisions += 1

    def _check_journaled(self, entry: Entry, event: RollbackJournaled) -> None:
        """Check a rollback that a machine decided without the ledger. Its step may be an earlier one."""
        replayed = self._rollout(entry, event.rollout)
        harm = list(kinds(find_harm(replayed.plan, from_json(Evidence, event.evidence))))
        if not harm or harm != list(kinds(event.reasons)):
            raise _difference(entry, "reasons", list(kinds(event.reasons)), harm)
        if event.outcome == APPLIED:
            types = _CHANGES[Verdict.roll_back]
            self.pending = _Pending(
                decided=entry,
                model=event.model,
                rollout=event.rollout,
                types=types,
                version=replayed.version,
            )
        self.decisions += 1

    def _require_counted(self, entry: Entry, rollout: str, evidence: Evidence) -> None:
        """Require that the access files give the recorded counts."""
        if self.logs is None:
            return
        replayed = self._rollout(entry, rollout)
        moment = Moment(
            plan=replayed.plan,
            weight=replayed.weight,
            started_at=replayed.started_at,
            step_started_at=replayed.step_started_at,
            evidence=evidence,
        )
        if (found := self.logs.first_difference(rollout, moment)) is not None:
            name, recorded, counted = found
            raise RolloutError(
                f"Event {entry.seq} ({entry.type}) differs: its {name} is {recorded}, but the access files give "
                f"{counted}."
            )

    def _decide_watch(self, entry: Entry, event: WatchDecided) -> None:
        replayed = self._rollout(entry, event.rollout)
        if entry.actor != ACTOR:
            raise _difference(entry, "actor", entry.actor, ACTOR, by="it must be")
        decision = judge_watch(replayed.plan, from_json(Evidence, event.evidence))
        _require_decision(entry, event, decision)
        if decision.verdict is Verdict.roll_back and not event.not_done:
            self.pending = _Pending(
                decided=entry,
                model=event.model,
                rollout=event.rollout,
                types=("AliasMoved", "RolloutRolledBack"),
                version=replayed.predecessor,
            )
        self.decisions += 1

    def _require_allowed(self, entry: Entry, event: _Change) -> None:
        """Require that this change of the controller is the next one that the decision before it gives."""
        pending = self.pending
        expected = "no change" if pending is None else pending.types[0]
        if pending is None or event.type != expected:
            raise _difference(entry, "change", event.type, expected)
        replayed = self._rollout(entry, pending.rollout)
        values: dict[str, tuple[Any, Any]] = {}
        if isinstance(event, AliasMoved):
            values = {"name": (event.name, pending.model), "alias": (event.alias, CHAMPION)}
        else:
            values = {"rollout": (event.rollout, pending.rollout)}
        if isinstance(event, AliasMoved | RolloutPromoted):
            values["version"] = (event.version, pending.version)
        if isinstance(event, RolloutWeightChanged):
            values["weight"] = (event.weight, replayed.plan.steps[replayed.step + 1].weight)
        for name, (recorded, computed) in values.items():
            if recorded != computed:
                raise _difference(entry, name, recorded, computed, by="it must be")
        self.pending = replace(pending, types=pending.types[1:]) if len(pending.types) > 1 else None

    def _rollout(self, entry: Entry, rollout: str) -> _Replayed:
        if rollout not in self.rollouts:
            raise RolloutError(f"Event {entry.seq}: rollout {rollout} has no policy before it.")
        return self.rollouts[rollout]


def _require_decision(
    entry: Entry,
    event: PolicyDecided | WatchDecided,
    decision: Decision,
    *,
    missing: tuple[list[str], list[str]] = ([], []),
) -> None:
    """Require that a recorded decision is the computed one. `missing` has its recorded and its computed value."""
    values = {
        "verdict": (event.verdict, decision.verdict.value),
        "reasons": (list(kinds(event.reasons)), list(kinds(decision.reasons))),
        "missing": missing,
    }
    for name, (recorded, computed) in values.items():
        if recorded != computed:
            raise _difference(entry, name, recorded, computed)


def _require_not_done(
    entry: Entry, not_done: str, replayed: _Replayed, decision: Decision, changes: tuple[str, ...]
) -> None:
    """Require that a decision's change was held up only where the rollout's state says so.

    The rights of the starter are not in the ledger, so any other text is accepted as their refusal.
    """
    if not changes or decision.verdict is Verdict.roll_back:
        expected = ""
    elif replayed.is_inconclusive:
        expected = ENDED
    elif replayed.is_paused:
        expected = PAUSED
    else:
        expected = "" if not_done in (ENDED, PAUSED) else not_done
    if not_done != expected:
        raise _difference(entry, "not_done", not_done, expected, by="it must be")


def _require_figures(entry: Entry, recorded: Iterable[str], computed: Iterable[str]) -> None:
    """Require that the figures in reasons and in what is missing are those that the counts give."""
    for one, other in zip(recorded, computed, strict=True):
        if (found := first_other_figure(one, other)) is not None:
            kind = one.partition(":")[0]
            raise _difference(entry, f"figure of '{kind}'", *found)


def replayed_lines(entries: Iterable[Entry], *, logs: AccessLogs | None = None) -> Iterator[str]:
    """Compute all decisions again, and yield a line about each; the last line counts them.

    Args:
        entries: The events of an export.
        logs: The access files to count again.

    Raises:
        RolloutError: A decision differs.
        LedgerCorrupt: An event is not one of this release, or was changed.
    """
    replay = Replay(logs=logs)
    for entry in verify_chain(entries):
        try:
            line = replay.add(entry)
        except RefusedError:
            raise
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise LedgerCorrupt(
                f"Event {entry.seq} ({entry.type}) cannot be computed again: {error}.", seq=entry.seq
            ) from error
        if line is not None:
            yield line
    replay.require_done()
    yield f"{replay.decisions} decisions of {len(replay.rollouts)} rollouts are as recorded"


def main() -> None:
    """Parse the flags and run the replay."""
    parser = argparse.ArgumentParser(
        prog="python -m serve_apps.rollout.replay",
        description="Compute each decision of the controller of rollouts again from its recorded counts.",
    )
    parser.add_argument(
        "--file", type=Path, required=True, help="export of `python -m cluster.ledger export`"
    )
    parser.add_argument("--logs", type=Path, help="folder with the edges' access files, to count units again")
    parser.add_argument(
        "--lag-s", type=float, default=LAG_S, help="seconds that the counts may have been behind the files"
    )
    parser.add_argument("--output", type=Path, help="file to write instead of standard output")
    arguments = parser.parse_args()
    try:
        try:
            logs = None if arguments.logs is None else AccessLogs(arguments.logs, lag_s=arguments.lag_s)
            with arguments.file.open() as file:
                lines = list(replayed_lines(read_lines(file), logs=logs))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{arguments.file} cannot be read: {error}.") from error
    except RefusedError as error:
        refuse(error)
    text = "".join(f"{line}\n" for line in lines)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.write_text(text)


def _require_equal(entry: Entry, name: str, recorded: Any, computed: Any) -> None:
    """Require that two JSON values are equal, numbers up to `_TOLERANCE`."""
    if isinstance(recorded, dict) and isinstance(computed, dict) and recorded.keys() == computed.keys():
        for key, value in recorded.items():
            _require_equal(entry, f"{name}.{key}", value, computed[key])
    elif isinstance(recorded, list) and isinstance(computed, list) and len(recorded) == len(computed):
        for number, (one, other) in enumerate(zip(recorded, computed, strict=True)):
            _require_equal(entry, f"{name}.{number}", one, other)
    elif isinstance(recorded, float | int) and isinstance(computed, float | int):
        if not math.isclose(recorded, computed, rel_tol=_TOLERANCE):
            raise _difference(entry, name, recorded, computed)
    elif recorded != computed:
        raise _difference(entry, name, recorded, computed)


def _difference(
    entry: Entry, name: str, recorded: Any, computed: Any, *, by: str = "its counts give"
) -> RolloutError:
    return RolloutError(
        f"Event {entry.seq} ({entry.type}) differs: its {name} is {recorded!r}, but {by} {computed!r}."
    )


if __name__ == "__main__":
    main()
