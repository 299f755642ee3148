"""Both networks in the training loop of `jobs.train`: ZeRO stages, and a run that was stopped and continues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.security.keys.access import KeyAccess
from jobs.train.config import CheckpointConfig, DeepSpeedConfig
from jobs.train.decoder.batches import EVALUATION_ROWS, TextBatches
from jobs.train.decoder.corpus import read_corpus, split_corpus
from jobs.train.decoder.family import Parameters, TextSignature
from jobs.train.network.plan import LoopConfig, plan_steps
from jobs.train.run.files import run_files
from tests.processes.training import Curve, SavedRun, checkpoint_bytes, run_group
from tests.servers.key_broker import running_broker

WORDS = ["the", "cat", "saw", "a", "dog", "bird", "near", "old", "river", "house"]


@pytest.fixture(scope="module")
def access() -> Iterator[KeyAccess]:
    with running_broker("models/m") as access:
        yield access


def batches(folder: Path) -> TextBatches:
    """Return the batches of some small texts."""
    draw = np.random.default_rng(0)
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(draw.choice(WORDS, 60)))
    parts = split_corpus(read_corpus(str(folder)), modulo=5, remainder=0, validation_share=0.2)
    return TextBatches(parts=parts, length=32)


def loop(texts: TextBatches, *, dropout: float = 0.0, **deepspeed: Any) -> LoopConfig:
    """Return a small fit of a decoder: two epochs."""
    parameters = Parameters(
        width=16, depth=2, heads=2, length=texts.length, epochs=2, batch_size=32, dropout=dropout
    )
    settings = DeepSpeedConfig(**deepspeed)
    steps = plan_steps(
        texts.num_rows, parameters, workers=[1, 2], accumulation=settings.gradient_accumulation
    )
    return LoopConfig(
        module="jobs.train.decoder.family",
        parameters=parameters,
        signature=TextSignature(),
        batches=texts,
        steps=steps,
        deepspeed=settings,
        seed=1,
        log_every=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What one process, and two processes of one group, have fitted."""

    alone: dict[str, Any]
    stages: list[dict[str, Any]]
    unbroken: dict[str, Any]
    continued: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, access: KeyAccess) -> Results:
    folder = tmp_path_factory.mktemp("runs")
    texts = batches(tmp_path_factory.mktemp("texts"))
    stages = [
        loop(texts, zero_stage=1, gradient_accumulation=2),
        loop(texts, zero_stage=3, activation_checkpointing=True),
    ]
    with_dropout = loop(texts, dropout=0.3, zero_stage=2)
    every_4 = CheckpointConfig(every_steps=4, log_every=1)
    first, second = (run_files(str(folder), model="m", run=run, access=access) for run in ("a", "b"))
    (alone,) = run_group([Curve(stages[0])], workers=1)
    *curves, unbroken, _, continued = run_group(
        [
            *(Curve(stage) for stage in stages),
            SavedRun(with_dropout, first, every_4),
            SavedRun(with_dropout, second, every_4, stopped_at=6),
            SavedRun(with_dropout, second, every_4),
        ],
        workers=2,
    )
    return Results(alone=alone, stages=curves, unbroken=unbroken, continued=continued, folder=folder)


def test_a_decoder_has_the_same_curve_for_every_stage_and_number_of_workers(results: Results) -> None:
    """The last row has tokens without a target, which do not change the mean of the workers' losses."""
    losses = results.alone["losses"]
    assert losses[-1] < losses[0] - 0.1
    for curve in results.stages:
        assert curve["losses"] == pytest.approx(losses, abs=1e-5)


def test_a_stopped_decoder_ends_with_the_weights_of_an_unbroken_one(results: Results) -> None:
    """Bit for bit, with dropout on. No checkpoint has words of the texts."""
    assert results.continued["continued_at"] is not None
    for name, weight in results.unbroken["weights"].items():
        assert weight.tobytes() == results.continued["weights"][name].tobytes()
    content = checkpoint_bytes(results.folder / "training_runs")
    assert content
    assert not any(word.encode() in content for word in WORDS if len(word) > 3)


def test_each_worker_validates_its_own_rows(tmp_path: Path) -> None:
    """All workers together validate each row once, and make equally many passes."""
    texts = batches(tmp_path)
    reader = texts.reader(seed=0)
    whole = [row for batch in reader.validation(rank=0, workers=1) for row in batch.matrix.tolist()]
    parts: list[list[int]] = []
    for rank in range(3):
        own = list(reader.validation(rank=rank, workers=3))
        assert len(own) <= reader.validation_steps(workers=3)
        assert all(len(batch.matrix) <= EVALUATION_ROWS for batch in own)
        parts += [row for batch in own for row in batch.matrix.tolist()]
    assert sorted(parts) == sorted(whole)
    assert len(reader.any_batch().matrix) == 1
