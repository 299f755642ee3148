"""A view that takes pushes, without a cluster: its ledger, push log, online store and table.

Also a process that takes pushes and runs streams. Tests kill it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import polars as pl

from cluster.ledger import Ledger
from cluster.security.keys.access import KeyAccess, key_store
from cluster.settings import OnlineConfig
from cluster.storage import Layout
from feature_jobs.materialize import newest_rows
from feature_jobs.store import (
    Aggregation,
    FeatureView,
    Field,
    FileSource,
    KafkaSource,
    Range,
    Sensitivity,
)
from feature_jobs.store.catalog.specifications import apply
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.offline.tables import Snapshot, Target, open_table
from feature_jobs.store.offline.window_values import aggregate
from feature_jobs.store.online.events import merge_function
from feature_jobs.store.online.reader import open_online_store
from feature_jobs.store.online.window_states import stored_view
from feature_jobs.store.streaming.kafka_consumer import ConsumerSettings, consume
from feature_jobs.store.streaming.kafka_stream import KafkaStream
from feature_jobs.store.streaming.lateness import Lateness, LatePolicy
from feature_jobs.store.streaming.micro_batches import table_horizon
from feature_jobs.store.streaming.push_stream import PushStream
from feature_jobs.store.streaming.pushed_view import load_pushed_view
from feature_jobs.store.streaming.pusher import Pusher, open_push_log
from serve_apps.features.request import parse_push
from tests.projects.online import reader_of
from tests.projects.tables import pin, target_of
from tests.projects.views import define, make_view

START = datetime(2024, 1, 1, tzinfo=UTC)
INCOME = make_view(
    source=FileSource("x.parquet", event_timestamp="at", created_timestamp="known_at"),
    schema=[Field("amount", "float64", sensitivity=Sensitivity.PERSONAL), Field("sector", "string")],
    checks=[Range("amount", 0, 1e6)],
    ttl=timedelta(days=30),
)
END = START + timedelta(hours=12)
"""By this time all rows that the tests push have happened and are known."""


def row(person: int, hour: float, amount: Any = 1.0, **fields: Any) -> dict[str, Any]:
    """Return a row as a client sends it."""
    at = (START + timedelta(hours=hour)).isoformat()
    features = {"amount": amount, "sector": f"s{person}"}
    return {"keys": {"person_id": person}, "features": features, "event_timestamp": at} | fields


def payments_view() -> FeatureView:
    """Return a view of the same name, aggregated from events.

    It is built on each call, because a module has one definition per name.
    """
    return make_view(
        source=INCOME.source,
        schema=[Field("payment", "string"), *INCOME.schema],
        checks=INCOME.checks,
        event_id="payment",
        aggregations=[
            Aggregation("amount", function, windows=[timedelta(hours=2), timedelta(hours=5)])
            for function in ("count", "sum", "last")
        ],
    )


def payment(number: int, hour: float, amount: float = 1.0, **fields: Any) -> dict[str, Any]:
    """Return an event of one of two people, as a client sends it."""
    sent = row(number % 2, hour, amount, **fields)
    return sent | {"features": sent["features"] | {"payment": f"p{number}"}}


class PushProject:
    """The objects that a replica and a stream have open."""

    def __init__(self, root: Path, access: KeyAccess, *, view: FeatureView = INCOME) -> None:
        self.places, self.access = Layout(str(root)), access
        self.ledger = Ledger(f"sqlite:///{root}/ledger.db")
        apply(define(view), self.ledger, actor="test")
        self.view = load_pushed_view(self.ledger, view.name)
        keys = key_store(access)
        self.store = open_online_store(OnlineConfig(map_size_gib=0.1), self.places, keys, readonly=False)
        self.log = open_push_log(self.ledger, self.places, view.name, keys)
        self.pusher = Pusher(self.view, self.places, self.store, self.log)

    def push(self, *rows: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Push rows and return the answer."""
        asked = parse_push({"view": self.view.spec.name, "rows": list(rows), "idempotency_key": key})
        now = datetime.now(UTC)
        return self.pusher.push(asked.rows, idempotency_key=key, digest=asked.digest, now=now)

    def stream(self, **changes: Any) -> PushStream:
        """Return the stream from the push log into the table."""
        spec = self.view.spec
        return PushStream(
            view=spec,
            target=self.target(),
            quarantine=self.quarantine(),
            log=self.log,
            store=self.store,
            ledger=self.ledger,
            actor="test",
            **changes,
        )

    def target(self) -> Target:
        """Return the table of the view."""
        spec = self.view.spec
        return target_of(self.places.features(spec.name), spec, self.access)

    def quarantine(self) -> QuarantineFiles:
        """Return the quarantine of the view."""
        name = self.view.spec.name
        return QuarantineFiles(folder=self.places.quarantine(name), view=name, access=self.access)

    def kafka(self, **changes: Any) -> KafkaStream:
        """Return the stream of the view's topic."""
        given = {"lateness": Lateness(None, LatePolicy.accept)} | changes
        return KafkaStream(
            view=self.view,
            topic=self.topic.topic,
            target=self.target(),
            quarantine=self.quarantine(),
            store=self.store,
            ledger=self.ledger,
            actor="test",
            **given,
        )

    @property
    def topic(self) -> KafkaSource:
        """Return the view's source. It must be a Kafka topic."""
        source = self.view.view.source
        assert isinstance(source, KafkaSource)
        return source

    def consume(self, **changes: Any) -> int:
        """Consume the messages of the topic, and return the number of rows."""
        reading = ConsumerSettings(
            source=self.topic, once=True, linger_s=0.01, max_rows=changes.pop("max_rows", 50_000)
        )
        return consume(self.kafka(**changes), reading, threading.Event())

    def snapshot(self) -> Snapshot:
        """Return the current version of the table."""
        return pin(self.target())

    def table(self) -> pl.DataFrame:
        """Return all rows of the table, in the order of ingestion."""
        pinned = self.snapshot()
        parts = [pinned.read(bucket, ["amount", "sector"]) for bucket in range(pinned.num_buckets)]
        return pl.concat([part for part in parts if not part.is_empty()], how="diagonal_relaxed").sort(
            "ingest_seq"
        )

    def amounts(self, *people: int, hour: float = 100) -> list[float | None]:
        """Return the amounts in the online store."""
        entities = [{"person_id": person} for person in people]
        vectors = reader_of(self.store, self.view.spec).read(entities, START + timedelta(hours=hour))
        return vectors.columns["income__amount"]

    def materialise(self) -> None:
        """Materialise the current table, as of `END`."""
        spec, pinned, table = self.view.spec, self.snapshot(), open_table(self.target().uri)
        assert table is not None
        found, merge = newest_rows(spec, pinned, END), merge_function(spec)
        self.store.replace(
            stored_view(spec), pinned.key_types, found, horizon=table_horizon(table), merge=merge
        )

    def served(self, *hours: float) -> list[dict[str, list[Any]]]:
        """Return the online features of two people at each hour."""
        reader = reader_of(self.store, self.view.spec)
        entities = [{"person_id": person} for person in (0, 1)]
        return [reader.read(entities, START + timedelta(hours=hour)).columns for hour in hours]

    def trained(self, *hours: float) -> list[dict[str, list[Any]]]:
        """Return the features of the same two people at each hour, from the table."""
        spec, pinned = self.view.spec, self.snapshot()
        assert spec.windows is not None
        parts = [pinned.read(bucket, spec.windows.table_columns) for bucket in range(pinned.num_buckets)]
        events = pl.concat([part for part in parts if not part.is_empty()], how="diagonal_relaxed")
        said = []
        for hour in hours:
            at = pl.lit(START + timedelta(hours=hour)).dt.cast_time_unit("us").alias("event_timestamp")
            asked = pl.DataFrame({"person_id": [0, 1]}).with_columns(at)
            answers = aggregate(asked, events, keys=spec.join_keys, windows=spec.windows).columns
            said.append(dict(zip(spec.columns, answers.to_dict(as_series=False).values(), strict=True)))
        return said

    def close(self) -> None:
        self.store.close()
        self.ledger.engine.dispose()


def kafka_view(servers: str, view: FeatureView = INCOME) -> FeatureView:
    """Return the same view with a Kafka source."""
    source = KafkaSource(
        servers, "incomes", event_timestamp="at", created_timestamp="known_at", deleted="gone"
    )
    return replace(view, source=source)


def message(person: int, hour: float, amount: Any = 1.0, **fields: Any) -> dict[str, Any]:
    """Return a row as a producer sends it."""
    at = (START + timedelta(hours=hour)).isoformat()
    return {"person_id": person, "amount": amount, "sector": f"s{person}", "at": at} | fields


@dataclass(frozen=True)
class Sent:
    """A message as the Kafka client returns it."""

    position: tuple[int, int]
    content: bytes

    def partition(self) -> int:
        return self.position[0]

    def offset(self) -> int:
        return self.position[1]

    def value(self) -> bytes:
        return self.content


def consume_until_killed(root: str, access: KeyAccess, servers: str) -> None:
    """Consume a topic into a view's table, few rows at a time."""
    project = PushProject(Path(root), access, view=kafka_view(servers))
    project.consume(max_rows=3)


def serve(root: str, access: KeyAccess, asked: Connection, *, aggregated: bool = False) -> None:
    """Run each received request, and send "done" after it.

    A request is a push, `stream`, which moves the log into the table, or `materialise`.
    """
    project = PushProject(Path(root), access, view=payments_view() if aggregated else INCOME)
    stream = project.stream(max_rows=5)
    while True:
        match asked.recv():
            case "materialise":
                project.materialise()
            case "stream":
                while stream.step():
                    pass
            case push:
                project.push(*push["rows"], key=push["key"])
        asked.send("done")
