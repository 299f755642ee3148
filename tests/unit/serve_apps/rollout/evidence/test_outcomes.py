"""Metrics of a rollout from real logs of predictions and outcomes."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.records.edge_counts.database import evidence_engine
from cluster.records.schema import OutcomeRecord, PredictionRecord
from cluster.records.segments import SegmentWriter
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.keys.keyring import Keyring
from cluster.statistics.evidence import MetricCounts
from cluster.statistics.quality import Quality
from cluster.storage import Layout
from serve_apps.rollout.evidence import outcomes
from serve_apps.rollout.evidence.metric_rules import MetricRule, Scoring
from serve_apps.rollout.evidence.metric_tables import CohortResult, read_metrics
from serve_apps.rollout.evidence.outcomes import OutcomeReader, RolloutMetrics
from serve_apps.rollout.evidence.store import LARGE_TABLES, SMALL_TABLES, EvidenceStore
from tests.samples.record_log import FLAGS, PERSONAL, answer, new_keyring, outcome, post, run

START = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
NUMBERS = ModelSignature(task=Task.regression, inputs=(InputSpec(name="x", dtype="int64"),), label="y")
WORDS = ModelSignature(
    task=Task.multiclass, inputs=(InputSpec(name="x", dtype="int64"),), label="y", classes=("a", "b", "c")
)
METRICS = RolloutMetrics(
    rollout="r",
    model="m",
    started_at=START,
    scoring=Scoring(
        outcome_window_s=400,
        rules=(MetricRule(name="brier", score="brier"), MetricRule(name="accuracy", score="accuracy")),
    ),
    treatment=2,
    champion=1,
)
COHORT_S = 100
"""Length of a cohort: a quarter of the window."""


def at(seconds: float) -> str:
    return (START + dt.timedelta(seconds=seconds)).isoformat()


class Logs:
    """The logs of model `m`, and a reader of its rollout."""

    def __init__(self, root: Path, signatures: Mapping[int, ModelSignature]) -> None:
        self.places, self.keyring = Layout(str(root)), new_keyring(root)
        self.ledger = Ledger(f"sqlite:///{root}/ledger.db")
        self.engine = evidence_engine(self.ledger.engine)
        self.signatures = signatures
        self.reader = self.new_reader(METRICS)

    @property
    def predictions(self) -> Path:
        return Path(self.places.predictions("m"))

    @property
    def outcomes(self) -> Path:
        return Path(self.places.outcomes("m"))

    def new_reader(self, metrics: RolloutMetrics) -> OutcomeReader:
        return OutcomeReader(
            self.ledger, self.places, self.keyring, signatures=self.signatures.__getitem__, metrics=metrics
        )

    def predict(self, *records: PredictionRecord) -> None:
        writer = SegmentWriter(self.predictions, store=self.keyring, key=PERSONAL)
        writer.append(*records)
        writer.close()

    def tell(self, *records: OutcomeRecord) -> None:
        post(self.outcomes, self.keyring, *records)

    def compact(self) -> None:
        for log in (self.predictions, self.outcomes):
            run(log, self.keyring)

    def collect(self, until_s: float) -> int:
        """Add all cohorts that are complete at a time, and return their number."""
        number = 0
        while self.reader.collect(now=START + dt.timedelta(seconds=until_s)):
            number += 1
        return number

    def metrics(self) -> dict[str, MetricCounts]:
        with self.engine.connect() as connection:
            return read_metrics(connection, "r")

    def accuracy(self) -> tuple[tuple[int, float], tuple[int, float]]:
        """Return units and mean of both arms."""
        counts = self.metrics()["accuracy"]
        return tuple((int(arm.units), float(arm.mean)) for arm in (counts.treatment, counts.control))  # type: ignore[return-value]


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    opened = Logs(tmp_path, {1: FLAGS, 2: FLAGS, 3: NUMBERS, 4: WORDS})
    yield opened
    opened.ledger.close()


def asked(
    number: int, unit: str, seconds: float, *labels: bool, arm: str = "treatment", **changes: Any
) -> PredictionRecord:
    """Return the record of a request; it has a row for each label."""
    predictions = [{"probability": 0.75 if label else 0.25, "label": label} for label in labels]
    values = {"time": at(seconds), "arm": arm, "rollout": "r", "unit_hash": unit, "version": 2}
    return answer(number, *(1 for _ in labels), **(values | {"predictions": predictions} | changes))


def test_a_unit_enters_once_with_the_mean_of_its_window(logs: Logs) -> None:
    """It enters when its window is over. Later requests and later outcomes do not change its value."""
    logs.predict(
        asked(1, "A", 10, True, False),
        asked(2, "A", 405, True),
        asked(3, "A", 450, False),
        asked(4, "B", 20, True, arm="control", version=1),
    )
    logs.tell(
        outcome(1, True, at(30)),
        outcome(1, True, at(40), row=1),
        outcome(2, False, at(409)),
        outcome(3, True, at(451)),
        outcome(4, True, at(419)),
    )
    assert logs.collect(499) == 0
    assert logs.metrics() == {}
    assert logs.collect(500) == 1
    assert logs.accuracy() == ((1, pytest.approx(1 / 3)), (1, 1.0))
    logs.tell(outcome(1, False, at(600)))
    assert logs.collect(5_000) > 5
    assert logs.accuracy() == ((1, pytest.approx(1 / 3)), (1, 1.0))
    [split] = logs.metrics()["accuracy"].splits
    assert (split.expected, split.treatment, split.control) == (0.5, 1, 1)


def test_only_outcomes_of_the_window_count_and_the_last_one_wins(logs: Logs) -> None:
    """An invalid outcome replaces no valid one. A unit without an outcome in its window does not enter."""
    logs.predict(*(asked(number, f"U{number}", 50, True) for number in range(5)))
    logs.tell(
        outcome(0, False, at(60)),
        outcome(0, True, at(70)),
        outcome(1, True, at(60)),
        outcome(1, "maybe", at(70)),
        outcome(2, True, at(451)),
        outcome(9, True, at(60)),
        outcome(3, True, at(60), row=7),
    )
    assert logs.collect(500) == 1
    assert logs.accuracy()[0] == (2, 1.0)


def test_other_requests_do_not_enter(logs: Logs) -> None:
    """Those outside the experiment, of other rollouts, of shadows, and without an answer."""
    logs.predict(
        asked(1, "A", 10, True, arm="outside"),
        asked(2, "B", 10, True, arm="shadow"),
        asked(3, "C", 10, True, rollout="other"),
        asked(4, "D", 10, True, fault="gave no score", predictions=[]),
        asked(5, "E", 10, True, predictions=[{"probability": None, "label": None}]),
        asked(6, "F", 10, True),
    )
    logs.tell(*(outcome(number, True, at(20)) for number in range(1, 7)))
    assert logs.collect(500) == 1
    assert logs.accuracy() == ((1, 1.0), (0, 0.0))


def test_a_fallback_stays_in_its_arm(logs: Logs) -> None:
    """The champion's answer to a treated unit counts for the treatment, as it would for the client."""
    logs.predict(asked(1, "A", 10, True, version=1, variant="champion"))
    logs.tell(outcome(1, False, at(20)))
    logs.collect(500)
    assert logs.accuracy() == ((1, 0.0), (0, 0.0))


@pytest.mark.parametrize("compacted", [False, True])
def test_sums_equal_those_of_all_units_at_once(logs: Logs, compacted: bool) -> None:
    """Whether the log is in segments or in its table, and whatever is compacted between two cohorts."""
    draw = random.Random(3)
    expected: dict[str, list[float]] = {"treatment": [], "control": []}
    asks: list[PredictionRecord] = []
    tells: list[OutcomeRecord] = []
    number = 0
    for unit in range(200):
        arm = ("treatment", "control")[unit % 2]
        first = draw.uniform(0, 1000)
        values = []
        for _ in range(draw.randint(1, 3)):
            label, truth = draw.random() < 0.5, draw.random() < 0.7
            time = first if not values else draw.uniform(first, first + 390)
            asks.append(asked(number, f"U{unit}", time, label, arm=arm, version=1 + unit % 2))
            tells.append(outcome(number, truth, at(time + 5)))
            values.append((0.75 if label else 0.25) - truth)
            number += 1
        expected[arm].append(float(np.mean(np.square(values))))
    for start in range(4):  # segments that overlap in time
        logs.predict(*asks[start::4])
        logs.tell(*tells[start::4])
    cohorts = 0
    for until_s in range(500, 1_600, 250):
        cohorts += logs.collect(until_s)
        if compacted:
            logs.compact()
            logs.reader = logs.new_reader(METRICS)
    assert cohorts == 11
    counts = logs.metrics()["brier"]
    for arm in ("treatment", "control"):
        moments = getattr(counts, arm)
        assert moments.units == 100
        assert moments.mean == pytest.approx(np.mean(expected[arm]))
        assert moments.squares == pytest.approx(np.var(expected[arm]) * 100)


@pytest.mark.parametrize(
    ("version", "quality", "prediction", "truth", "value"),
    [
        (3, Quality.squared_error, {"value": 1.5}, 1.0, 0.25),
        (3, Quality.squared_error, {"value": 9.0}, 1.0, 4.0),  # the limit
        (4, Quality.brier, {"probabilities": {"a": 0.5, "b": 0.5, "c": 0.0}, "label": "a"}, "b", 0.5),
        (4, Quality.accuracy, {"probabilities": {}, "label": "b"}, "b", 1.0),
        (4, Quality.squared_error, {"probabilities": {}, "label": "b"}, "b", None),
        (3, Quality.brier, {"value": 1.5}, 1.0, None),
    ],
)
def test_each_task_has_its_score(
    logs: Logs, version: int, quality: Quality, prediction: dict[str, Any], truth: Any, value: float | None
) -> None:
    """A metric that does not fit to the task has no units."""
    logs.reader = logs.new_reader(
        replace(
            METRICS,
            scoring=Scoring(
                outcome_window_s=400,
                rules=(MetricRule(name="score", score=quality),),
                squared_error_limit=4.0,
            ),
        )
    )
    logs.predict(asked(1, "A", 10, True, version=version, predictions=[prediction]))
    logs.tell(outcome(1, truth, at(20)))
    logs.collect(500)
    moments = logs.metrics()["score"].treatment
    assert (moments.units, moments.mean) == ((0, 0.0) if value is None else (1, pytest.approx(value)))


def test_a_killed_pass_counts_nothing_twice(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed before its transaction ends. Of two readers that read the same cohort, one stores it."""
    logs.predict(asked(1, "A", 10, True), asked(2, "B", 110, True))
    logs.tell(outcome(1, True, at(20)), outcome(2, True, at(120)))
    original = outcomes.add_cohort

    def die(*arguments: Any, **named: Any) -> CohortResult:
        original(*arguments, **named)
        raise KeyboardInterrupt

    for expected in (1, 2):
        now = START + dt.timedelta(seconds=400 + expected * COHORT_S)
        with monkeypatch.context() as patch:
            patch.setattr(outcomes, "add_cohort", die)
            with pytest.raises(KeyboardInterrupt):
                logs.reader.collect(now=now)
        assert logs.reader.collect(now=now)
        with logs.engine.begin() as connection:
            result = original(connection, "r", number=expected - 1, units=["Z"], values={})
        assert result is CohortResult.already
        assert logs.accuracy()[0] == (expected, 1.0)


def test_forgotten_rollout_leaves_no_rows(logs: Logs) -> None:
    """Its units, sums and cohorts are removed."""
    logs.predict(asked(1, "A", 10, True))
    logs.tell(outcome(1, True, at(20)))
    logs.collect(500)
    EvidenceStore(logs.ledger.engine).forget("r")
    with logs.engine.connect() as connection:
        assert all(
            connection.execute(sa.select(table)).first() is None for table in (*SMALL_TABLES, *LARGE_TABLES)
        )


def test_keys_of_the_log_are_needed(logs: Logs, tmp_path: Path) -> None:
    """A reader without the keys gets an error, and nothing is counted."""
    logs.predict(asked(1, "A", 10, True))
    other = tmp_path / "other"
    other.mkdir()
    logs.keyring = Keyring.create(other / "keyring.json", bytes(range(32)))
    reader = logs.new_reader(METRICS)
    with pytest.raises(Exception, match="key"):
        reader.collect(now=START + dt.timedelta(seconds=500))
    assert logs.metrics() == {}
