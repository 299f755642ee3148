"""`python -m feature_jobs.stream source=push|kafka view=v [once=true]`: stream rows into a feature table, exactly once.

With `kafka.consumers=4`, that many Ray actors read and check a topic's partitions, and this process commits. If the
command was killed, run it again: it continues from the position in the table's own commits.
"""

from __future__ import annotations

import enum
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import CommitConflict, DefinitionError
from cluster.host.signals import set_on_signal
from cluster.ledger import Ledger, open_ledger
from cluster.placement import find_nodes
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.security.keys.access import key_store
from cluster.session import attach, require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout, resolve
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ViewSpec, view_spec
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.definitions.limits import CENTURY, validate_num_buckets
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.online.reader import open_online_store
from feature_jobs.store.streaming.kafka_stream import KafkaStream
from feature_jobs.store.streaming.lateness import Lateness, LatePolicy
from feature_jobs.store.streaming.micro_batches import Tally
from feature_jobs.store.streaming.push_stream import PushStream
from feature_jobs.store.streaming.pushed_view import load_pushed_view
from feature_jobs.store.streaming.pusher import open_push_log
from feature_jobs.view_tables import view_quarantine, view_target

LONGEST_WAIT_S = 86_400


class StreamSource(enum.Enum):
    """Where rows come from."""

    push = "push"
    """The view's push log."""
    kafka = "kafka"
    """The topic of the view's source."""


@dataclass(kw_only=True, slots=True)
class KafkaConfig:
    """How a Kafka topic is read."""

    properties_file: str | None = None
    """File with properties of librdkafka, one `name=value` per line, for example the login. Every node that runs a
    consumer needs the file."""
    consumers: int = 1
    """Number of Ray actors that share the partitions, at most one per partition; 1 reads in this process."""
    linger_s: float = 0.1
    """Time in seconds during which rows are collected for one commit."""
    max_lateness_s: float | None = None
    """How far in seconds a row may be behind the latest of its partition; None is any distance."""
    late: LatePolicy = LatePolicy.accept
    """What happens to rows further behind."""

    def __post_init__(self) -> None:
        if self.consumers < 1:
            raise ValueError(f"kafka.consumers must be at least 1, got {self.consumers}.")
        if not 0 < self.linger_s <= LONGEST_WAIT_S:
            raise ValueError(
                f"kafka.linger_s must be positive, at most {LONGEST_WAIT_S}, got {self.linger_s}."
            )
        if self.max_lateness_s is not None and not 0 <= self.max_lateness_s <= CENTURY.total_seconds():
            raise ValueError(
                f"kafka.max_lateness_s must not be negative, nor more than a century, got {self.max_lateness_s}."
            )


@dataclass(kw_only=True, slots=True)
class StreamConfig(PlatformConfig):
    """Configuration of `feature_jobs.stream`."""

    definitions: str = "feature_jobs.census"
    """Not used. Other feature commands have this option. Pushed rows were checked when they were pushed."""
    source: StreamSource = StreamSource.push
    view: str = "???"
    once: bool = False
    """End when no row is left, instead of waiting for more."""
    interval_s: float = 1.0
    """Time in seconds to wait after a step without rows."""
    max_rows: int = 50_000
    """Maximum number of rows of one commit."""
    num_buckets: int = 8
    """Number of buckets of a new table. An existing table keeps its number."""
    kafka: KafkaConfig = field(default_factory=KafkaConfig)

    def __post_init__(self) -> None:
        if not 0 < self.interval_s <= LONGEST_WAIT_S:
            raise ValueError(f"interval_s must be positive, at most {LONGEST_WAIT_S}, got {self.interval_s}.")
        if self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {self.max_rows}.")
        validate_num_buckets(self.num_buckets)


_ROWS = {StreamSource.push: "pushed", StreamSource.kafka: "Kafka"}


@job("stream", StreamConfig, timed=True)
def main(config: StreamConfig) -> None:
    """Stream into one view's table until no row is left, or until stopped."""
    if config.source is StreamSource.push:
        refuse_unused(("kafka",), by="source=push")
    ledger = open_ledger(config)
    needs_ray = config.source is StreamSource.kafka and config.kafka.consumers > 1
    record = attach(config) if needs_ray else require_running_cluster(config)
    actor = create_actor(config, record, ledger, entrypoint="feature_jobs.stream")
    view = view_spec(ledger, config.view)
    actor.check(Action.write_features, *view_resources(view, region=config.cluster.region))
    stopped = _stop_on_signals()
    tally = Tally()
    match config.source:
        case StreamSource.push:
            stream = push_stream(config, view, ledger, actor)
            run(stream, config, stopped)
            tally = stream.tally
        case StreamSource.kafka:
            run_kafka(config, ledger, actor, stopped, tally)
    print(f"view {view.name}: {summarize(tally, _ROWS[config.source])}")


def summarize(tally: Tally, kind: str) -> str:
    """Return one line with the numbers of rows of a run."""
    total = tally.stored + tally.quarantined
    text = f"{total} {kind} rows taken: {tally.stored} into the table, {tally.quarantined} quarantined"
    if tally.reasons:
        reason, count = tally.reasons.most_common(1)[0]
        text += f" (mostly: {reason}, {count})"
    return text if not tally.late else f"{text}; {tally.late} came late"


def push_stream(config: StreamConfig, view: ViewSpec, ledger: Ledger, actor: Actor) -> PushStream:
    """Return the stream from a view's push log."""
    places, keys = layout(config.storage), key_store(actor.access)
    return PushStream(
        view=view,
        target=view_target(view, places, actor.access, new_buckets=config.num_buckets),
        quarantine=view_quarantine(view.name, places, actor.access),
        log=open_push_log(ledger, places, view.name, keys),
        store=open_online_store(config.online, places, keys, readonly=False),
        ledger=ledger,
        actor=actor.name,
        max_rows=config.max_rows,
    )


def run_kafka(
    config: StreamConfig, ledger: Ledger, actor: Actor, stopped: threading.Event, tally: Tally | None = None
) -> int:
    """Stream a view's topic, and return the number of rows taken. `tally` counts what happened to them.

    Raises:
        DefinitionError: the view's source is not a Kafka topic.
    """
    from feature_jobs.consumers import consume_apart  # imports librdkafka, which a push stream does not need
    from feature_jobs.store.streaming.kafka_consumer import ConsumerSettings, consume

    view, places = load_pushed_view(ledger, config.view), layout(config.storage)
    if not isinstance(view.view.source, KafkaSource):
        raise DefinitionError(
            f"View '{config.view}' has no KafkaSource. Run `python -m feature_jobs.ingest`."
        )
    lateness_s = config.kafka.max_lateness_s
    ahead = FutureLimit.of(config.features.max_ahead_s, online_at_once=True)
    stream = KafkaStream(
        view=view,
        topic=view.view.source.topic,
        target=view_target(view.spec, places, actor.access, new_buckets=config.num_buckets),
        quarantine=view_quarantine(config.view, places, actor.access),
        store=open_online_store(config.online, places, key_store(actor.access), readonly=False),
        ledger=ledger,
        actor=actor.name,
        lateness=Lateness(None if lateness_s is None else round(lateness_s * 1e6), config.kafka.late),
        ahead=ahead,
        tally=tally or Tally(),
    )
    file = config.kafka.properties_file
    reading = ConsumerSettings(
        source=view.view.source,
        properties_file=None if file is None else Path(resolve(file)),
        once=config.once,
        linger_s=config.kafka.linger_s,
        max_rows=config.max_rows,
        ahead=ahead,
    )
    if config.kafka.consumers > 1:
        return consume_apart(
            stream, reading, stopped, consumers=config.kafka.consumers, selector=find_nodes(config.placement)
        )
    return consume(stream, reading, stopped)


def run(stream: PushStream, config: StreamConfig, stopped: threading.Event) -> int:
    """Run steps until stopped, or with `once` until no row is left. Return the number of rows taken."""
    total = 0
    while not stopped.is_set():
        try:
            rows = stream.step()
        except CommitConflict:
            continue  # another job committed: read the position from the table again
        total += rows
        if rows == 0:
            if config.once:
                break
            stopped.wait(config.interval_s)
    return total


def _stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set. The current batch is finished first."""
    stopped = threading.Event()

    set_on_signal([signal.SIGTERM, signal.SIGINT], stopped)
    return stopped


if __name__ == "__main__":
    main()
