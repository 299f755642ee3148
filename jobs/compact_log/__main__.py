"""`python -m jobs.compact_log name=m`: move a model's logged predictions and outcomes from segments into tables.

Segments of replicas that are still writing are left alone, so this job can run while replicas serve and while other
jobs read the log. With a remote storage root it takes the segments that the nodes have uploaded. If it is killed, run
the same command again: it finishes the work, and no record is lost or duplicated.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import ModelNotFound, did_you_mean
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import OutcomesCompacted, PredictionsCompacted
from cluster.ledger.table_versions import unrecorded
from cluster.records.compaction import compact
from cluster.records.location import AnyLog, location_of, outcome_log, prediction_log
from cluster.records.progress import log_age
from cluster.records.table import LogTable
from cluster.registry import Registry
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout

CompactedEvent = type[PredictionsCompacted] | type[OutcomesCompacted]


@dataclass(kw_only=True, slots=True)
class CompactLogConfig(PlatformConfig):
    """Configuration of one compaction."""

    name: str = "???"
    """Model name."""


@job("compact_log", CompactLogConfig, timed=True)
def main(config: CompactLogConfig) -> None:
    """Compact the prediction log and the outcome log of a model."""
    ledger = open_ledger(config)
    compact_logs(
        config,
        ledger,
        create_actor(config, require_running_cluster(config), ledger, entrypoint="jobs.compact_log"),
    )


def compact_logs(config: CompactLogConfig, ledger: Ledger, actor: Actor) -> None:
    """Check that the actor may compact the logs of this model, then compact both.

    Raises:
        ModelNotFound: No such model; nothing was read.
        AccessDenied: The actor may not compact the logs of this model; nothing was read.
    """
    places = layout(config.storage)
    known = Registry(ledger, places).names()
    if config.name not in known:
        raise ModelNotFound(f"No model '{config.name}'.{did_you_mean(config.name, known)}")
    actor.check(Action.compact_log, Resource(kind="model", name=config.name, region=config.cluster.region))
    for log, event in (
        (prediction_log(places, ledger, config.name), PredictionsCompacted),
        (outcome_log(places, ledger, config.name), OutcomesCompacted),
    ):
        age = log_age(log)
        num_segments = compact_log(log, event, ledger, actor, model=config.name)
        print(
            f"{log.kind} of {config.name}: {num_segments} segments taken, {LogTable(log.root).records} records in the "
            f"table; log: {age}"
        )


def compact_log(log: AnyLog, event: CompactedEvent, ledger: Ledger, actor: Actor, *, model: str) -> int:
    """Compact one log until no closed segment is left, and append the events. Returns the number of segments."""
    total = 0
    while num_segments := compact(log, store=key_store(actor.access), files=protected_files(actor.access)):
        total += num_segments
    append_events(log, event, ledger, model=model, actor=actor.name)
    return total


def append_events(log: AnyLog, event: CompactedEvent, ledger: Ledger, *, model: str, actor: str) -> None:
    """Append an event for each compaction that has none yet, including those of a job that was killed."""
    compactions = LogTable(location_of(log).root).compactions()
    for version in unrecorded(ledger, event, compactions, model=model):
        compaction = compactions[version]
        ledger.append(
            event(
                model=model,
                table_version=version,
                segments=compaction.segments,
                records=compaction.records,
            ),
            actor=actor,
        )


if __name__ == "__main__":
    main()
