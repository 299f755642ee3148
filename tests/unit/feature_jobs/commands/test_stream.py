"""The command `feature_jobs.stream`, without attaching to Ray and without policies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from omegaconf import OmegaConf

from cluster.errors import CommitConflict, ConfigError, DefinitionError
from cluster.security.acting import Actor
from cluster.security.keys.access import KeyAccess
from cluster.settings import OnlineConfig, StorageConfig
from cluster.settings_conversion import load
from feature_jobs.store.streaming.micro_batches import Tally
from feature_jobs.store.streaming.push_stream import PushStream
from feature_jobs.stream import StreamConfig, StreamSource, push_stream, run, run_kafka, summarize
from tests.projects.push import PushProject, kafka_view, message, row
from tests.servers.kafka_broker import mock_broker


def config(root: Path, **overrides: Any) -> StreamConfig:
    """Return the settings for a view `income` below a folder."""
    return StreamConfig(
        storage=StorageConfig(root=str(root)),
        online=OnlineConfig(map_size_gib=0.1),
        view="income",
        once=True,
        num_buckets=2,
        **overrides,
    )


def actor(access: KeyAccess) -> Actor:
    """Return an actor whose permissions are not checked."""
    return cast(Actor, SimpleNamespace(name="test", access=access))


def test_once_streams_all_pushes_and_stops(project: PushProject, tmp_path: Path, access: KeyAccess) -> None:
    """A run with `once` makes as many commits as it needs."""
    for number in range(5):
        project.push(row(number, 1), key=str(number))
    project.store.close()
    settings = config(tmp_path, max_rows=2)
    stream = push_stream(settings, project.view.spec, project.ledger, actor(access))
    assert run(stream, settings, threading.Event()) == 5
    assert project.table().height == 5
    assert project.snapshot().num_buckets == 2
    stream.store.close()


def test_once_streams_a_topic_to_its_end(
    open_project: Callable[..., PushProject], tmp_path: Path, access: KeyAccess
) -> None:
    """The view's record in the ledger has the source. Quarantined rows are counted separately."""
    with mock_broker() as broker:
        project = open_project(kafka_view(broker.servers))
        project.store.close()
        broker.send("incomes", message(1, 1), message(2, 1), message(3, -1, -1.0))
        settings = config(tmp_path, source=StreamSource.kafka)
        tally = Tally()
        assert run_kafka(settings, project.ledger, actor(access), threading.Event(), tally) == 3
        assert project.table()["person_id"].to_list() == [1, 2]
        expected = "3 Kafka rows taken: 2 into the table, 1 quarantined (mostly: amount outside 0..1e+06, 1)"
        assert summarize(tally, "Kafka") == expected


def test_view_without_a_topic_is_refused(project: PushProject, tmp_path: Path, access: KeyAccess) -> None:
    """The error names the command to run."""
    with pytest.raises(DefinitionError, match="no KafkaSource"):
        run_kafka(config(tmp_path), project.ledger, actor(access), threading.Event())


class Scripted:
    """A stream whose steps return given row counts or raise given errors."""

    def __init__(self, *steps: int | Exception) -> None:
        self._steps = list(steps)

    def step(self) -> int:
        step = self._steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step


def test_stream_waits_and_retries_after_a_conflict(tmp_path: Path) -> None:
    """It runs until it is stopped. Other errors are raised."""
    stopped = threading.Event()
    settings = config(tmp_path, interval_s=0.001)
    settings.once = False
    scripted = cast(PushStream, Scripted(1, 0, CommitConflict("meanwhile"), 2, OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        run(scripted, settings, stopped)
    stopped.set()
    assert run(cast(PushStream, Scripted()), settings, stopped) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        "interval_s=0",
        "max_rows=0",
        "num_buckets=0",
        "kafka.consumers=0",
        "kafka.linger_s=0",
        "kafka.max_lateness_s=-1",
    ],
)
def test_settings_out_of_range_are_refused(wrong: str) -> None:
    """The error names the setting."""
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        load(OmegaConf.from_dotlist(["view=v", wrong]), StreamConfig)
