"""`python -m serve_apps.rollout.replay --file export.jsonl`: compute each decision of the controller again.

It needs no cluster. It verifies the hash chain of the export, computes each verdict from the recorded counts, and
checks that the controller's changes are those that the verdicts allow. At the first difference it exits with 2 and
names the event.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, LedgerCorrupt, RefusedError, RolloutError
from cluster.ledger.chain import Entry, read_lines, verify_chain
from cluster.ledger.events import (
    PolicyDecided,
    PolicyStarted,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutWeightChanged,
)
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan, Traffic, plan
from cluster.statistics.verdict import Decision, Verdict, judge
from serve_apps.rollout.controller.controller import ACTOR
from serve_apps.rollout.controller.decisions import kinds
from serve_apps.rollout.json_form import as_json, from_json

_TOLERANCE = 1e-6
"""Relative difference of a plan's numbers that another release of SciPy may cause."""


@dataclass(kw_only=True, slots=True)
class _Replayed:
    """One rollout during the replay."""

    plan: Plan
    evidence: Evidence | None = None
    decision: Decision | None = None
    is_done: bool = True
    """Whether the last decision's change was made."""


@dataclass(kw_only=True, slots=True)
class Replay:
    """Computes the decisions of all rollouts again, in the order of the ledger."""

    rollouts: dict[str, _Replayed] = field(default_factory=dict)
    decisions: int = 0

    def add(self, entry: Entry) -> str | None:
        """Compute an event again, and return a line about it, or None for other events.

        Raises:
            RolloutError: The event differs from what its counts give. The message names its `seq`.
        """
        event = entry.event()
        match event:
            case PolicyStarted():
                stored = from_json(Plan, event.plan)
                try:
                    computed = plan(stored.policy, from_json(Traffic, event.traffic))
                except RolloutError as error:
                    raise RolloutError(
                        f"Event {entry.seq} ({entry.type}) differs: its policy has no plan. {error}"
                    ) from error
                _require_equal(entry, "plan", as_json(stored), as_json(computed))
                self.rollouts[event.rollout] = _Replayed(plan=stored)
                return f"{entry.seq} {event.model} {event.rollout}: plan of {len(stored.steps)} steps"
            case PolicyDecided():
                self._decide(entry, event)
                return f"{entry.seq} {event.model} {event.rollout}: {event.verdict}"
            case (
                RolloutWeightChanged(rollout=rollout)
                | RolloutPromoted(rollout=rollout)
                | RolloutRolledBack(rollout=rollout)
            ) if entry.actor == ACTOR:
                self._require_allowed(entry, event, rollout)
        return None

    def _decide(self, entry: Entry, event: PolicyDecided) -> None:
        replayed = self._rollout(entry, event.rollout)
        evidence = from_json(Evidence, event.evidence)
        decision = judge(replayed.plan, evidence)
        computed = {
            "verdict": decision.verdict.value,
            "reasons": list(kinds(decision.reasons)),
            "missing": list(kinds(decision.missing)),
        }
        recorded = {
            "verdict": event.verdict,
            "reasons": list(kinds(event.reasons)),
            "missing": list(kinds(event.missing)),
        }
        for name in computed:
            if computed[name] != recorded[name]:
                raise _difference(entry, name, recorded[name], computed[name])
        replayed.evidence, replayed.decision, replayed.is_done = evidence, decision, bool(event.not_done)
        self.decisions += 1

    def _require_allowed(
        self, entry: Entry, event: RolloutWeightChanged | RolloutPromoted | RolloutRolledBack, rollout: str
    ) -> None:
        """Require that the last decision gives this change of the controller."""
        replayed = self._rollout(entry, rollout)
        decision, evidence = replayed.decision, replayed.evidence
        expected = ""
        if decision is not None and evidence is not None and not replayed.is_done:
            match decision.verdict:
                case Verdict.roll_back:
                    expected = "RolloutRolledBack"
                case Verdict.promote:
                    expected = "RolloutPromoted"
                case Verdict.advance if not decision.missing and evidence.step + 1 < len(replayed.plan.steps):
                    expected = "RolloutWeightChanged"
        if event.type != expected:
            raise _difference(entry, "change", event.type, expected or "no change")
        if isinstance(event, RolloutWeightChanged):
            assert evidence is not None
            weight = replayed.plan.steps[evidence.step + 1].weight
            if event.weight != weight:
                raise _difference(entry, "weight", event.weight, weight)
        replayed.is_done = True

    def _rollout(self, entry: Entry, rollout: str) -> _Replayed:
        if rollout not in self.rollouts:
            raise RolloutError(f"Event {entry.seq}: rollout {rollout} has no policy before it.")
        return self.rollouts[rollout]


def replayed_lines(entries: Iterable[Entry]) -> Iterator[str]:
    """Compute all decisions again, and yield a line about each; the last line counts them.

    Raises:
        RolloutError: A decision differs.
        LedgerCorrupt: An event is not one of this release, or was changed.
    """
    replay = Replay()
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
    parser.add_argument("--output", type=Path, help="file to write instead of standard output")
    arguments = parser.parse_args()
    try:
        try:
            with arguments.file.open() as file:
                lines = list(replayed_lines(read_lines(file)))
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


def _difference(entry: Entry, name: str, recorded: Any, computed: Any) -> RolloutError:
    return RolloutError(
        f"Event {entry.seq} ({entry.type}) differs: its {name} is {recorded!r}, but its counts give {computed!r}."
    )


if __name__ == "__main__":
    main()
