"""Messages of a topic are stored exactly once, and go online. The tests use Kafka's own protocol."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import CommitConflict, ConfigError, SourceError
from cluster.ledger.events import BatchIngested
from cluster.security.keys.access import KeyAccess
from feature_jobs.store import Unique
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.ingestion.message_rows import NO_VALUE, check_messages
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.quarantine_replay import recheck_rows
from feature_jobs.store.streaming import kafka_consumer
from feature_jobs.store.streaming.kafka_consumer import ConsumerSettings, librdkafka_properties
from feature_jobs.store.streaming.kafka_stream import Fenced, KafkaStream
from feature_jobs.store.streaming.lateness import BEGINNING, Lateness, LatePolicy
from tests.processes import forks
from tests.projects.push import PushProject, Sent, consume_until_killed, kafka_view, message, payments_view
from tests.servers.kafka_broker import MockBroker
from tests.unit.feature_jobs.streaming.push_kills import KILLS, require_same_results

TOPIC = "incomes"


@pytest.fixture
def project(open_project: Callable[..., PushProject], broker: MockBroker) -> PushProject:
    return open_project(kafka_view(broker.servers))


def ingested(project: PushProject, *names: str) -> list[Any]:
    """Return some fields of every batch's event."""
    return [[entry.payload[name] for name in names] for entry in project.ledger.entries(BatchIngested)]


def test_rows_are_stored_once_and_read_online(project: PushProject, broker: MockBroker) -> None:
    """Rows of all partitions are stored. The next start continues behind them."""
    broker.send(TOPIC, message(1, 1, 5.0), message(2, 1, 6.0))
    broker.send(TOPIC, message(3, 1, 7.0), partition=1)
    assert (project.consume(), project.consume()) == (3, 0)
    assert project.amounts(1, 2, 3) == [5.0, 6.0, 7.0]
    broker.send(TOPIC, message(1, 2, 8.0), message(2, 2, gone=True))
    assert project.consume() == 2
    assert project.amounts(1, 2, 3) == [8.0, None, 7.0]
    assert sorted(project.table()["ingest_seq"]) == [0, 1, 2, 3, 4]
    assert ingested(project, "rows_in", "rows_stored") == [[3, 3], [2, 2]]


def test_streamed_events_give_the_same_values_online_and_offline(
    open_project: Callable[..., PushProject], broker: MockBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The view has aggregations. A crash kept some events from going online, and others correct earlier ones."""
    project = open_project(kafka_view(broker.servers, payments_view()))
    broker.send(TOPIC, message(1, 6, 5.0, payment="a"), message(0, 6, 7.0, payment="b"))
    project.consume()
    project.materialise()
    broker.send(TOPIC, message(1, 7, 2.0, payment="c"), message(0, 7, payment="b", gone=True))
    with monkeypatch.context() as patched:
        patched.setattr(project.store, "update", lambda *_: None)
        project.consume()
    assert project.served(7) != project.trained(7)
    broker.send(TOPIC, message(1, 7.5, 4.0, payment="a"))
    project.consume()
    assert project.served(7, 7.5, 8.5, 12) == project.trained(7, 7.5, 8.5, 12)
    assert project.served(7.5)[0]["income__amount_sum_5h"] == [None, 6.0]


def test_no_message_stops_the_stream(project: PushProject, broker: MockBroker) -> None:
    """Each bad message is in quarantine with its reason, also those from before the first row."""
    broker.send(TOPIC, b"nonsense")
    assert project.consume() == 0
    bad: list[tuple[Any, str]] = [
        (b"[1]", "the message is no JSON object"),
        (None, NO_VALUE),
        ({"amount": 1.0}, "person_id is null"),
        (message("one", 1), "person_id is no int64"),  # type: ignore[arg-type]
        (b'{"person_id": 1180591620717411303424}', "person_id is no key"),
        (message(1, 1, "much"), "amount is no float64"),
        (message(1, 1, -5.0), "amount outside 0..1e+06"),
        (message(1, 1) | {"at": 10**18}, "at is no timestamp"),
    ]
    broker.send(TOPIC, message(7, 1, 7.0, at=1_704_067_200_000), *(sent for sent, _ in bad))
    assert project.consume() == 10
    assert project.amounts(7, hour=1) == [7.0]
    # On a busy machine the messages may come in more than one batch.
    batches = ingested(project, "rows_in", "rows_stored", "reasons")
    assert sum(rows_in for rows_in, _, _ in batches) == 10
    assert sum(stored for _, stored, _ in batches) == 1
    reasons = sum((Counter(reasons) for _, _, reasons in batches), Counter())
    assert reasons == dict.fromkeys(["the message is no JSON", *(reason for _, reason in bad)], 1)


def test_messages_from_before_the_first_row_are_stored(project: PushProject, broker: MockBroker) -> None:
    """They wait until the first row shows the type of the key, and are stored with it."""
    broker.send(TOPIC, b"nonsense", b"more of it", message(1, 1, 5.0))
    assert project.consume(max_rows=1) == 3
    assert ingested(project, "rows_in", "reasons") == [[3, {"the message is no JSON": 2}]]


def test_rules_for_whole_batches_do_not_apply_to_messages() -> None:
    """A batch of messages ends at an arbitrary message, and at another one after a crash."""
    view = dataclasses.replace(kafka_view("a:1"), checks=(Unique(["person_id"]),))
    messages = [orjson.dumps(message(1, 1))] * 2
    checked = check_messages(messages, view, key_types={}, now=datetime.now(UTC))
    assert (checked.good.num_rows, checked.bad.num_rows) == (2, 0)
    assert "__source" not in checked.good.column_names


def test_quarantined_messages_are_checked_again(
    project: PushProject, broker: MockBroker, access: KeyAccess
) -> None:
    """A message that is not a row stays. A row that the view accepts now is good."""
    bad = [b"nonsense", message("one", 1), message(2, 1, -5.0) | {"at": 1_704_067_200_000}]  # type: ignore[arg-type]
    broker.send(TOPIC, message(1, 1, 5.0), *bad)
    project.consume()
    [[name]] = ingested(project, "ingest_id")
    folder = project.places.quarantine("income")
    file = QuarantineFiles(folder=folder, view="income", access=access).read(name)
    lenient = dataclasses.replace(project.view.view, checks=())
    rechecked = recheck_rows(file, lenient, now=datetime.now(UTC), baseline=None)
    assert rechecked.reasons.to_pylist() == ["the message is no JSON", "person_id is no int64", None]
    assert rechecked.good is not None
    assert rechecked.good["amount"].to_pylist() == [-5.0]


def test_next_start_finishes_a_batch_after_a_crash(
    project: PushProject, broker: MockBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows in the table go online, and the ledger gets its event."""
    broker.send(TOPIC, message(1, 1, 5.0))

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(KafkaStream, "_put_online", crash)
        with pytest.raises(KeyboardInterrupt):
            project.consume()
    assert (project.amounts(1), ingested(project, "rows_in")) == ([None], [])
    assert project.consume() == 0
    assert (project.amounts(1), ingested(project, "rows_in")) == ([5.0], [[1]])


def test_consumer_with_an_older_generation_is_refused(project: PushProject, broker: MockBroker) -> None:
    """A consumer that finds a later generation in the table stores no more rows."""
    broker.send(TOPIC, message(1, 1, 5.0))
    project.consume()
    old, new = project.kafka(), project.kafka()
    old.start()
    new.start()
    with pytest.raises(Fenced, match="started later"):
        old.store_messages([Sent((0, 1), b"{}")])
    with pytest.raises(Fenced, match="started later"):
        old.start()
    assert new.store_messages([Sent((0, 0), b"{}")]) == 0, "the table has it already"
    assert project.table().height == 1


@pytest.mark.parametrize("policy", list(LatePolicy))
def test_late_rows_are_counted_and_stored_or_quarantined(
    project: PushProject, broker: MockBroker, policy: LatePolicy
) -> None:
    """The partition's watermark counts, also across commits and starts. A late row never replaces a newer one."""
    lateness = Lateness(3_600_000_000, policy)
    broker.send(TOPIC, message(1, 5, 5.0), message(1, 4, 4.0), message(2, 3.9, 3.9))
    broker.send(TOPIC, message(3, 1, 1.0), partition=1)
    project.consume(lateness=lateness)
    broker.send(TOPIC, message(4, 2, 2.0), message(4, 6, -1.0), message(4, 4.5, 4.5))
    project.consume(lateness=lateness)
    are_stored = policy is LatePolicy.accept
    assert project.amounts(1, 2, 3, 4) == [5.0, 3.9 if are_stored else None, 1.0, 4.5]
    late = [[1, {}], [1, {"amount outside 0..1e+06": 1}]]
    if not are_stored:
        late = [[1, {"late": 1}], [1, {"late": 1, "amount outside 0..1e+06": 1}]]
    assert ingested(project, "rows_late", "reasons") == late


@given(st.lists(st.integers(-5, 20)), st.integers(0, 5), st.integers(0, 20))
def test_lateness_does_not_depend_on_the_batches(events: list[int], max_us: int, cut: int) -> None:
    """Events in two parts give the same result as in one part."""
    lateness = Lateness(max_us, LatePolicy.accept)
    first, watermark = lateness.find_late(events[:cut], BEGINNING)
    second, end = lateness.find_late(events[cut:], watermark)
    assert (first + second, end) == lateness.find_late(events, BEGINNING)
    late = first + second
    assert late == [
        event < max(events[:index], default=BEGINNING) - max_us for index, event in enumerate(events)
    ]


def test_unavailable_broker_is_named(project: PushProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the topic."""
    monkeypatch.setattr(kafka_consumer, "ANSWER_S", 0.3)
    away = KafkaSource("127.0.0.1:1", TOPIC, event_timestamp="at")
    reading = ConsumerSettings(source=away, once=True)
    with pytest.raises(SourceError, match=r"kafka://127\.0\.0\.1:1/incomes cannot be read"):
        kafka_consumer.consume(project.kafka(), reading, threading.Event())


def test_properties_file_cannot_change_exactly_once_settings(tmp_path: Path) -> None:
    """An invalid line is refused."""
    file = tmp_path / "kafka.properties"
    file.write_text("# how to log in\nsasl.mechanism=PLAIN\nenable.auto.commit=true\n\n")
    source = KafkaSource("a:1", TOPIC, event_timestamp="at")
    given = librdkafka_properties(ConsumerSettings(source=source, properties_file=file))
    assert (given["sasl.mechanism"], given["enable.auto.commit"]) == ("PLAIN", False)
    file.write_text("nonsense\n")
    with pytest.raises(ConfigError, match="line 1 is not name=value"):
        librdkafka_properties(ConsumerSettings(source=source, properties_file=file))


@pytest.mark.parametrize(
    "line",
    [
        "plugin.library.paths=/tmp/evil.so",
        "  plugin.library.paths = evil",
        "ssl.engine.location=/tmp/evil.so",
        "ssl.engine.id=evil",
        "ssl.providers=default,evil",
        "sasl.kerberos.kinit.cmd=id",
        "sasl.kerberos.principal=$(id)",
        "interceptors=evil",
    ],
)
def test_properties_that_could_run_code_are_refused(tmp_path: Path, line: str) -> None:
    """librdkafka loads a library as soon as it gets such a property, and Kerberos' properties are part of a shell
    command. The message names the line and the property, but not the value."""
    file = tmp_path / "kafka.properties"
    file.write_text(f"sasl.mechanism=PLAIN\n{line}\n")
    reading = ConsumerSettings(source=KafkaSource("a:1", TOPIC, event_timestamp="at"), properties_file=file)
    with pytest.raises(ConfigError, match=rf"line 2: {line.partition('=')[0].strip()} could load") as error:
        librdkafka_properties(reading)
    assert "evil" not in str(error.value)


def test_killed_consumer_loses_and_duplicates_no_rows(
    tmp_path: Path, access: KeyAccess, broker: MockBroker, open_project: Callable[..., PushProject]
) -> None:
    """Killed at random points and started again: table, quarantine and online store are the same as without kills."""
    draw = random.Random(0)
    for _ in range(15 * (KILLS + 1)):
        person = draw.randrange(4)
        row = message(person, draw.randrange(6), draw.choice([1.0, -1.0, draw.random()]))
        broker.send(TOPIC, row | {"gone": draw.random() < 0.2}, partition=person % 2)
    whole = open_project(kafka_view(broker.servers), folder="whole")
    whole.consume()
    (tmp_path / "killed").mkdir()
    kills = sum(killed_midway(tmp_path / "killed", access, broker) for _ in range(KILLS))
    assert kills == KILLS
    killed = open_project(kafka_view(broker.servers), folder="killed")
    killed.consume()
    columns = ["person_id", "event_timestamp", "amount", "sector", "deleted"]
    expected, actual = (run.table().select(columns).sort(pl.all()) for run in (whole, killed))
    assert actual.equals(expected)
    assert killed.table()["ingest_seq"].is_unique().all()
    require_same_results(killed, whole)


def killed_midway(root: Path, access: KeyAccess, broker: MockBroker) -> bool:
    """Run a consumer and kill it a moment after one of its next commits.

    Return whether it was killed before it had finished.
    """
    context = forks.context()
    consumer = context.Process(target=consume_until_killed, args=(str(root), access, broker.servers))
    log = root / "features" / "income" / "_delta_log"
    num_commits = len(list(log.glob("*.json"))) + random.randint(1, 4)
    consumer.start()
    while consumer.is_alive() and len(list(log.glob("*.json"))) < num_commits:
        consumer.join(0.002)
    consumer.join(random.uniform(0.0, 0.05))
    consumer.kill()
    consumer.join()
    return consumer.exitcode != 0


def test_conflict_is_retried(
    project: PushProject, broker: MockBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit of another job between read and commit causes a retry and loses no row."""
    broker.send(TOPIC, message(1, 1, 5.0))
    original_take, calls = KafkaStream.store_messages, []

    def take(stream: KafkaStream, messages: Any) -> int:
        calls.append(len(messages))
        if len(calls) == 1:
            raise CommitConflict("meanwhile")
        return original_take(stream, messages)

    monkeypatch.setattr(KafkaStream, "store_messages", take)
    assert project.consume() == 1
    assert calls == [1, 1]
