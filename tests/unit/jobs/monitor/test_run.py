"""A monitoring run computes only what has changed. Ray is a double; logs, ledger, keys and NannyML are real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.records.compaction import compact
from cluster.records.location import outcome_log, prediction_log
from cluster.records.schema import OutcomeRecord
from cluster.records.segments import SegmentWriter
from cluster.runtime import InputSpec
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess, key_store
from cluster.storage import layout
from jobs.monitor.__main__ import monitored_event
from jobs.monitor.config import MonitorConfig, Period
from jobs.monitor.reference import References
from jobs.monitor.run import Measured, MonitorRun
from jobs.train.data import read_training_set
from tests.projects.batch_scoring import MODEL, ScoringProject
from tests.samples.record_log import OUTCOMES, PERSONAL, prediction
from tests.samples.signatures import of_each_task
from tests.servers.key_broker import running_broker
from tests.unit.jobs.monitor.inline_tasks import InlineRay

INPUTS = (
    InputSpec(name="age", dtype="double"),
    InputSpec(name="sex", dtype="string", categories=("f", "m")),
)
DAY_ROWS, MIN_ROWS = 120, 50


@pytest.fixture(scope="module")
def access() -> Iterator[KeyAccess]:
    with running_broker(PERSONAL, OUTCOMES, f"models/{MODEL}") as access:
        yield access


class Monitored:
    """A model with a log of some days, and monitoring runs over it."""

    def __init__(self, project: ScoringProject, ray: InlineRay) -> None:
        self.project, self.ray = project, ray
        self.places = layout(project.storage)
        self.logs = {
            "predictions": prediction_log(self.places, project.ledger, MODEL),
            "outcomes": outcome_log(self.places, project.ledger, MODEL),
        }
        self._draw = np.random.default_rng(1)
        project.register(of_each_task(*INPUTS).binary)
        project.write(self.reference(), "reference.parquet")
        self._next = 0

    def reference(self) -> dict[str, Any]:
        rows = 600
        age = self._draw.normal(40, 20, rows)
        times = np.datetime64("2025-01-01", "us") + np.arange(rows) * np.timedelta64(1, "h")
        return {
            "age": age,
            "sex": self._draw.choice(["f", "m"], rows),
            "truth": np.where(age + self._draw.normal(0, 9, rows) > 45, "yes", "no"),
            "event_timestamp": times,
        }

    def ask(self, day: int, *, rows: int = DAY_ROWS, shift: float = 0.0) -> list[int]:
        """Log requests of one entity each, and return their numbers."""
        numbers = list(range(self._next, self._next + rows))
        self._next += rows
        records = []
        for number, age in zip(numbers, self._draw.normal(40 + shift, 20, rows), strict=True):
            score = float(np.clip((age - 10) / 70, 0.01, 0.99))
            records.append(
                prediction(
                    number,
                    as_of=f"2026-01-{day:02}T00:00:00+00:00",
                    entities=[{"id": number}],
                    features={"age": [age], "sex": [str(self._draw.choice(["f", "m"]))]},
                    predictions=[{"label": "yes" if score > 0.5 else "no", "probability": score}],
                )
            )
        self._write("predictions", PERSONAL, records)
        return numbers

    def observe(self, numbers: list[int]) -> None:
        """Log an outcome of each request."""
        time = "2026-03-01T00:00:00+00:00"
        self._write(
            "outcomes",
            OUTCOMES,
            [
                OutcomeRecord(
                    prediction_id=f"p{number}",
                    outcome="yes" if self._draw.random() < 0.5 else "no",
                    observed_at=time,
                    received_at=time,
                )
                for number in numbers
            ],
        )

    def compact(self) -> None:
        store = key_store(self.project.access)
        for log in self.logs.values():
            compact(log, store=store, files=protected_files(self.project.access))

    def run(self, **options: Any) -> Measured:
        """Run the monitoring, and append its event."""
        settings: dict[str, Any] = {
            "name": MODEL, "reference": str(self.project.root / "reference.parquet"), "label": "truth",
            "period": Period.day, "min_rows": MIN_ROWS, "split": None,
        }  # fmt: skip
        config = MonitorConfig(storage=self.project.storage, **settings | options)
        files, ledger = protected_files(self.project.access), self.project.ledger
        run = MonitorRun(
            config=config,
            places=self.places,
            ledger=ledger,
            actor=self.project.actor(),
            attach=lambda: None,
            references=References(
                config.reference,
                lambda path: read_training_set(path, files, places=self.places, ledger=ledger),
            ),
        )
        [measured] = run.measure_log(run.count())
        ledger.append(
            monitored_event(config, measured, traffic={}, results="monitor/m/run/x.json"), actor="t"
        )
        return measured

    def _write(self, kind: str, key: str, records: list[Any]) -> None:
        store = key_store(self.project.access)
        writer = SegmentWriter(self.logs[kind].folder, store=store, key=key)
        writer.append(*records)
        writer.close()


@pytest.fixture
def monitored(tmp_path: Path, access: KeyAccess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Monitored]:
    project = ScoringProject(tmp_path, access)
    yield Monitored(project, InlineRay(monkeypatch))
    project.close()


def test_a_chunk_is_computed_once_and_reopened_by_new_records_and_outcomes(monitored: Monitored) -> None:
    """The result always equals that of a run that computes everything. NannyML is fitted once."""
    first_day = monitored.ask(1)
    monitored.ask(2)
    monitored.observe(first_day[:100])
    first = monitored.run()
    assert monitored.ray.chunks == ["2026-01-01", "2026-01-02"]
    assert first.figures["status"] == "measured"
    assert (first.figures["rows"], first.figures["outcomes"]) == (240, 100)
    assert first.figures["periods"]["2026-01-01"]["realised_auc"] is not None
    assert first.figures["periods"]["2026-01-02"]["realised_auc"] is None
    assert set(first.figures["reconstruction"]) == {"2026-01-01", "2026-01-02"}

    assert monitored.run().figures == first.figures
    assert monitored.ray.chunks == []

    monitored.compact()
    assert monitored.run().figures == first.figures
    assert monitored.ray.chunks == []
    assert monitored.ray.counted

    monitored.observe(first_day[100:])
    assert monitored.run().figures["outcomes"] == DAY_ROWS
    assert monitored.ray.chunks == ["2026-01-01"]

    monitored.ask(2, rows=10)
    monitored.ask(3, shift=40)
    last = monitored.run()
    assert monitored.ray.chunks == ["2026-01-02", "2026-01-03"]
    assert last.figures["drift"]["age"]["2026-01-03"]["alert"]
    assert not last.figures["drift"]["age"]["2026-01-01"]["alert"]
    assert (len(monitored.ray.fitted), len(monitored.ray.read)) == (1, 2)

    folder = Path(monitored.places.monitor(MODEL))
    for path in folder.rglob("*.sealed"):
        path.unlink()
    assert monitored.run().figures == last.figures
    assert len(monitored.ray.chunks) == 3


def test_a_fit_without_its_hash_in_the_ledger_is_not_read(monitored: Monitored) -> None:
    """A pickle can run code, so a changed file is not even decrypted."""
    monitored.ask(1)
    monitored.run()
    [path] = Path(monitored.places.monitor(MODEL)).glob("fits/*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monitored.ask(2)
    monitored.run()
    assert (len(monitored.ray.fitted), monitored.ray.read) == (2, [])


def test_small_chunks_and_odd_values_are_counted(monitored: Monitored) -> None:
    """A chunk below `min_rows` has no figures. Without a large chunk, NannyML is not fitted."""
    numbers = monitored.ask(1, rows=MIN_ROWS - 1)
    monitored.observe([*numbers, 999])
    small = monitored.run()
    assert small.figures["status"] == f"no chunk has {MIN_ROWS} rows: nothing to measure"
    assert small.figures["undefined"]["drift"] == {"2026-01-01": f"chunk below min_rows: 49 of {MIN_ROWS}"}
    assert small.figures["periods"]["2026-01-01"]["outcomes"] == MIN_ROWS - 1
    assert small.figures["left_out"]["outcomes_of_unknown_predictions"] == 1
    assert monitored.ray.fitted == []
