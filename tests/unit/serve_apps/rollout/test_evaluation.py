"""Guardrail and monitor over a real replica's log: each version separately, unusable outcomes counted separately."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ledger import open_ledger
from cluster.records.segments import SegmentWriter
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.keys.access import key_store
from cluster.settings import StorageConfig
from serve_apps.rollout.comparison.evaluation import evaluate
from serve_apps.rollout.comparison.guardrail import Verdict
from serve_apps.rollout.comparison.shadow import compare_shadow
from serve_apps.rollout.config import RolloutConfig
from serve_apps.rollout.serving_state import Rollout
from tests.samples.record_log import FLAGS, LATER, answer, outcome
from tests.servers.replica import MODEL, Replica, running_replica

WORDS = ModelSignature(
    task=Task.multiclass,
    inputs=(InputSpec(name="x", dtype="string", categories=("old", "new")),),
    label="y",
    classes=("a", "b", "c"),
)
ROLLOUT = Rollout(id="r", salt="s", treatment_version=2, treatment_variant="challenger", weight=50.0)


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """Two versions: the first always answers correctly, the second the opposite.

    One odd outcome, as an older release stored it, turned a column of flags into one of texts.
    """
    with running_replica(tmp_path_factory.mktemp("replica"), FLAGS) as running:
        for signature in (FLAGS, WORDS):
            running.register(signature)
        truths = [bool(number % 2) for number in range(40)]
        records: list[Any] = []
        for number, truth in enumerate(truths):
            version, arm = (1, "control") if number < 20 else (2, "treatment")
            score = 0.9 if truth is (version == 1) else 0.1
            predictions = [{"probability": score, "label": score > 0.5}]
            said = {"rollout": "r", "arm": arm, "variant": "champion", "predictions": predictions}
            records.append(answer(number, number, version=version, **said))
        records.append(
            answer(90, 5, version=2, rollout="r", arm="treatment", predictions=[], fault="gave no score")
        )
        share = {"a": 0.25, "b": 0.5, "c": 0.25}
        predictions = [{"probabilities": share, "label": "b"}]
        records.append(answer(91, "old", version=3, variant="champion", predictions=predictions))
        write(running, "predictions", *records)
        write(
            running,
            "outcomes",
            *(outcome(number, truth) for number, truth in enumerate(truths)),
            outcome(91, "c"),
            outcome(77, "true"),
            outcome(3, True, row=4),
            outcome(5, "maybe", LATER),
        )
        yield running


def write(replica: Replica, log: str, *records: Any) -> None:
    folder = Path(replica.places.root) / log / MODEL
    writer = SegmentWriter(folder, store=key_store(replica.keys), key=f"{log}/{MODEL}/sensitive")
    writer.append(*records)
    writer.close()


def test_one_odd_outcome_does_not_silence_the_guardrail(replica: Replica) -> None:
    """The bad treatment is found, and the finding counts what was left out."""
    storage = StorageConfig(root=replica.places.root)
    config = RolloutConfig(name=MODEL, min_outcomes=20, storage=storage)
    actor: Any = SimpleNamespace(access=replica.keys)
    finding = evaluate(config, open_ledger(config), actor, ROLLOUT)
    assert (finding.verdict, finding.treatment, finding.control) == (Verdict.breached, 0.0, 1.0)
    assert (finding.treatment_outcomes, finding.control_outcomes) == (20, 20)
    assert (finding.odd_outcomes, finding.unknown_outcomes) == (1, 2)
    assert (finding.treatment_failures, finding.control_failures) == (1, 0)


def test_a_shadow_is_compared_with_the_answers_to_the_same_requests(replica: Replica) -> None:
    """The shadow agrees with version 1, which is right, and contradicts version 2, which is wrong."""
    records: list[Any] = []
    for number in range(10, 30):
        score = 0.8 if number % 2 else 0.2
        said = {"arm": "shadow", "variant": "shadow", "prediction_id": f"s{number}"}
        said["predictions"] = [{"probability": score, "label": score > 0.5}]  # type: ignore[assignment]
        records.append(answer(number, number, version=2, **said))
    of_another_version = answer(11, 11, version=1, arm="shadow", variant="shadow", prediction_id="old")
    not_answered = answer(500, 1, version=2, arm="shadow", variant="shadow", prediction_id="lost")
    write(replica, "predictions", *records, of_another_version, not_answered)
    config = RolloutConfig(name=MODEL, storage=StorageConfig(root=replica.places.root))
    actor: Any = SimpleNamespace(access=replica.keys)
    finding = compare_shadow(config, open_ledger(config), actor, 2)
    assert (finding.version, finding.rows, finding.outcomes) == (2, 20, 20)
    assert (finding.equal_labels, finding.mean_difference) == (0.5, pytest.approx(0.4))
    assert (finding.metric, finding.shadow, finding.served) == ("roc_auc", 1.0, 0.5)
    nothing = compare_shadow(config, open_ledger(config), actor, 3)
    assert (nothing.version, nothing.rows, nothing.equal_labels, nothing.served) == (3, 0, None, None)
