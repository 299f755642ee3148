"""`python -m jobs.compact_log name=m`: a model's logged predictions and outcomes from segments into tables.

It takes what replicas have left or have died with, so it can run beside them, and readers beside it. Killed at any
point, the same command run again finishes the job; no record is lost or doubled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.entrypoint import job
from cluster.errors import ModelNotFound, did_you_mean
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import OutcomesCompacted, PredictionsCompacted
from cluster.records.compaction import compact
from cluster.records.table import LogTable
from cluster.registry import Registry
from cluster.security.acting import Actor, act
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from cluster.session import require_record
from cluster.settings import PlatformConfig
from cluster.storage import layout, local

Compacted = type[PredictionsCompacted] | type[OutcomesCompacted]


@dataclass(kw_only=True, slots=True)
class CompactLogConfig(PlatformConfig):
    """Whose log."""

    name: str = "???"
    """Of the model."""


@job("compact_log", CompactLogConfig, timed=True)
def main(config: CompactLogConfig) -> None:
    """Compact both logs of a model."""
    ledger = open_ledger(config)
    compact_both(config, ledger, act(config, require_record(config), ledger, entrypoint="jobs.compact_log"))


def compact_both(config: CompactLogConfig, ledger: Ledger, actor: Actor) -> None:
    """If the actor may: what a scope says of a model holds for its logs.

    Raises:
        ModelNotFound, AccessDenied: before anything was looked at.
    """
    places = layout(config.storage)
    known = Registry(ledger, places).names()
    if config.name not in known:
        raise ModelNotFound(f"No model '{config.name}'.{did_you_mean(config.name, known)}")
    actor.check(Action.compact_log, Resource(kind="model", name=config.name, region=config.cluster.region))
    for log, event in (
        (local(places.predictions(config.name)), PredictionsCompacted),
        (local(places.outcomes(config.name)), OutcomesCompacted),
    ):
        taken = run(log, event, ledger, actor, model=config.name)
        print(
            f"{log.parts[-2]} of {config.name}: {taken} segments taken, {LogTable(log).records} records in the table"
        )


def run(log: Path, event: Compacted, ledger: Ledger, actor: Actor, *, model: str) -> int:
    """Compact one log until no segment is left that could be taken, and say so in the ledger; gives their number."""
    total = 0
    while taken := compact(log, store=key_store(actor.access), files=protected_files(actor.access)):
        total += taken
    record(log, event, ledger, model=model, actor=actor.name)
    return total


def record(log: Path, event: Compacted, ledger: Ledger, *, model: str, actor: str) -> None:
    """Say in the ledger what was compacted, also what a killed job did not get to say."""
    said = {
        entry.payload["table_version"] for entry in ledger.entries(event) if entry.payload["model"] == model
    }
    for version, one in sorted(LogTable(log).compactions().items()):
        if version not in said:
            ledger.append(
                event(model=model, table_version=version, segments=one.segments, records=one.records),
                actor=actor,
            )


if __name__ == "__main__":
    main()
