"""An edge's access files and their reader, and the evidence of the sample's rollout."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from cluster.ledger import Ledger
from cluster.records.edge_counts.database import evidence_engine
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan, Traffic, plan
from cluster.statistics.policy import MAX_UNITS, EventGuardrail, Policy, Step, UnitEvent
from serve_apps.rollout.evidence import collecting
from serve_apps.rollout.evidence.access_files import Rotation
from serve_apps.rollout.evidence.collecting import Reader
from serve_apps.rollout.evidence.store import EvidenceStore
from tests.samples.access_records import GOOD, ROLLOUT_ID

START = dt.datetime.fromtimestamp(GOOD["ended_ms"] / 1000, dt.UTC)
START_MS = GOOD["ended_ms"]
DAY = dt.timedelta(days=1)


class Node:
    """The access files of one edge, and their reader."""

    def __init__(
        self, ledger: Ledger, folder: Path, *, edge: str = "one", rotation: Rotation | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.engine, self.folder, self.edge = evidence_engine(ledger.engine), folder, edge
        self.ledger_engine = ledger.engine
        self.rotation = rotation or Rotation()
        self.restart()

    def restart(self) -> None:
        """Replace the reader, as after kill -9."""
        self.reader = Reader(self.ledger_engine, self.folder, edge=self.edge, rotation=self.rotation)

    def state(self) -> collecting._State:
        """Return what is stored about the edge."""
        with self.engine.connect() as connection:
            return collecting._load(connection, self.edge)

    def write(self, *lines: bytes, name: str = "20270115T080000-a.jsonl") -> None:
        with (self.folder / name).open("ab") as file:
            file.write(b"".join(lines))


def the_plan(*, unit_watch_s: float = 0.0, max_units: int = MAX_UNITS) -> Plan:
    policy = Policy(
        steps=(Step(weight=20), Step(weight=50)),
        event_guardrails=(EventGuardrail(event=UnitEvent.failure, limit=0.2),),
        deadline_s=3 * 86_400,
        unit_watch_s=unit_watch_s,
        max_units=max_units,
    )
    return plan(policy, Traffic(units_per_hour=10_000, events={UnitEvent.failure: 0.01}))


def evidence(
    store: EvidenceStore, *, after: dt.timedelta = dt.timedelta(minutes=1), step: int = 0, **changes: Any
) -> Evidence:
    """Return the evidence of the sample's rollout, so long after its start."""
    times = {
        "step_started_at": START - dt.timedelta(seconds=1),
        "started_at": START - dt.timedelta(seconds=1),
    }
    arguments = times | changes
    return store.evidence(
        ROLLOUT_ID, arguments.pop("plan", the_plan()), step=step, now=START + after, **arguments
    )


def failures(store: EvidenceStore, **options: Any) -> tuple[int, int]:
    counts = evidence(store, **options).events[UnitEvent.failure]
    return counts.treatment, counts.control
