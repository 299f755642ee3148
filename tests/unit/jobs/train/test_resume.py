"""Networks without Ray: ZeRO stages give the curve of one process, and a killed run ends as if nothing had happened."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.security.keys.access import KeyAccess
from jobs.train.config import CheckpointConfig, DeepSpeedConfig, LearningConfig
from jobs.train.data import TrainingSet
from jobs.train.network.plan import LoopConfig, plan_steps
from jobs.train.network.protocol import NetworkSignature, network_signature
from jobs.train.rows.batches import TableBatches
from jobs.train.rows.file import RowFile
from jobs.train.run.files import RunFiles, find_checkpoint, run_files
from jobs.train.tabular_network.family import Parameters
from jobs.train.training_data import prepare_rows
from tests.processes.training import Curve, HalfWritten, SavedRun, checkpoint_bytes, run_group
from tests.samples import frozen_network, hugging_face
from tests.unit.jobs.train.conftest import write_people

TABULAR = "jobs.train.tabular_network.family"
FROZEN = frozen_network.__name__
BERT = hugging_face.__name__
pytestmark = pytest.mark.timeout(
    1500
)  # five processes that import torch and DeepSpeed start one after another
EVERY_5 = CheckpointConfig(every_steps=5, log_every=1)


def loop(row_file: RowFile, *, module: str = TABULAR, dropout: float = 0.0, **deepspeed: Any) -> LoopConfig:
    """Return a small fit: two epochs of 33 steps of 100 rows."""
    config = LearningConfig(name="m", training_set="t", label="y")
    data = prepare_rows(config, TrainingSet(table=row_file, manifest={}, hash="h"))
    tabular = Parameters(width=8, depth=1, embedding_dim=2, epochs=2, batch_size=100, dropout=dropout)
    parameters: Any = tabular if module == TABULAR else importlib.import_module(module).Parameters()
    if module == BERT:
        parameters.dropout = dropout
    settings = DeepSpeedConfig(**deepspeed)
    steps = plan_steps(
        int(data.fit.sum()), parameters, workers=[1, 2], accumulation=settings.gradient_accumulation
    )
    return LoopConfig(
        module=module,
        parameters=parameters,
        signature=network_signature(data),
        batches=TableBatches(rows=data.rows),
        steps=steps,
        deepspeed=settings,
        seed=1,
        log_every=1,
    )


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(
        first[name].tobytes() == second[name].tobytes() for name in first
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What one process, and two processes of one group, have fitted."""

    alone: list[Any]
    together: list[Any]
    """A fit for each ZeRO stage, two of the frozen network, and one of a Hugging Face model."""
    unbroken: dict[str, Any]
    continued: dict[str, Any]
    resharded: list[dict[str, Any]]
    """For ZeRO 0 to 3: a run of two workers, then one, then two, without dropout."""
    other_stages: list[tuple[dict[str, Any], dict[str, Any]]]
    """An unbroken and a continued run of ZeRO stage 0, then of stage 3, then of a Hugging Face model."""
    folder: Path
    files: RunFiles
    """Files of the continued run."""
    signature: NetworkSignature


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, access: KeyAccess) -> Results:
    """Run all fits in three process groups, because a process takes seconds to start."""
    folder = tmp_path_factory.mktemp("runs")
    row_file = write_people(folder, access)
    stages = [
        loop(row_file, zero_stage=0),
        loop(row_file, zero_stage=1, gradient_accumulation=5),
        loop(row_file, zero_stage=2),
        loop(row_file, zero_stage=3),
    ]
    frozen = [
        loop(row_file, module=FROZEN, zero_stage=1),
        loop(row_file, module=FROZEN, zero_stage=2, activation_checkpointing=True),
    ]
    bert = loop(row_file, module=BERT, zero_stage=2, activation_checkpointing=True)
    with_dropout = loop(row_file, dropout=0.3, zero_stage=2)
    first, second = (run_files(str(folder), model="m", run=run, access=access) for run in ("a", "b"))
    others: list[SavedRun] = []
    bert_with_dropout = loop(row_file, module=BERT, dropout=0.3, zero_stage=1)
    for number, config in enumerate(
        [*(loop(row_file, dropout=0.3, zero_stage=stage) for stage in (0, 3)), bert_with_dropout]
    ):
        for run, stopped_at in (("a", None), ("b", 13), ("b", None)):
            files = run_files(str(folder), model="m", run=f"{run}{number}", access=access)
            others.append(SavedRun(config, files, EVERY_5, stopped_at=stopped_at))

    def resharded(stopped_at: int | None) -> list[SavedRun]:
        return [
            SavedRun(
                config,
                run_files(str(folder), model="m", run=f"r{config.deepspeed.zero_stage}", access=access),
                EVERY_5,
                stopped_at=stopped_at,
            )
            for config in stages
        ]

    together = run_group(
        [
            *(Curve(one) for one in [*stages, *frozen, bert]),
            SavedRun(with_dropout, first, EVERY_5),
            SavedRun(with_dropout, second, EVERY_5, stopped_at=13),
            SavedRun(with_dropout, second, EVERY_5, stopped_at=37),
            HalfWritten(second),
            SavedRun(with_dropout, second, EVERY_5),
            *others,
            *resharded(13),
        ],
        workers=2,
    )
    bert_alone = loop(row_file, module=BERT, zero_stage=0)
    alone = run_group([Curve(stages[0]), Curve(frozen[0]), Curve(bert_alone), *resharded(37)], workers=1)
    ends = run_group(resharded(None), workers=2)
    return Results(
        alone=alone[:3],
        together=together[:7],
        unbroken=together[7],
        continued=together[11],
        resharded=ends,
        other_stages=[(together[first], together[first + 2]) for first in (12, 15, 18)],
        folder=folder,
        files=second,
        signature=bert.signature,
    )


def test_every_zero_stage_gives_the_curve_of_one_process(results: Results) -> None:
    """Also with accumulation, a frozen layer, activation checkpointing, and a Hugging Face model."""
    stages, frozen, bert = results.together[:4], results.together[4:6], results.together[6:]
    for expected, fits in zip(results.alone, (stages, frozen, bert), strict=True):
        assert len(expected["losses"]) == 66
        assert expected["losses"][-1] < expected["losses"][0]
        for fit in fits:
            assert fit["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    weights = [fit["weights"]["blocks.0.0.weight"].tobytes() for fit in frozen]
    assert weights == [results.alone[1]["weights"]["blocks.0.0.weight"].tobytes()] * 2


def test_a_stopped_run_ends_with_the_weights_of_an_unbroken_one(results: Results) -> None:
    """It stopped inside each epoch. Weights and losses are equal bit for bit, with dropout on.

    The newest checkpoint was half written, and was skipped.
    """
    assert results.unbroken["continued_at"] is None
    assert results.continued["continued_at"] == (1, 15)
    assert results.continued["losses"] == results.unbroken["losses"][1:]
    assert equal(results.continued["weights"], results.unbroken["weights"])
    for unbroken, continued in results.other_stages:
        assert continued["continued_at"] == (0, 10)
        assert continued["losses"] == unbroken["losses"]
        assert equal(continued["weights"], unbroken["weights"])


def test_frozen_parameters_of_a_hugging_face_model_stay(results: Results) -> None:
    """The first layer is as `build` made it, also after a stop. The second one is trained."""
    torch.manual_seed(1)  # the seed of the runs
    first = hugging_face.build(results.signature, hugging_face.Parameters()).state_dict()
    _, continued = results.other_stages[2]
    for weights in (results.together[6]["weights"], results.alone[2]["weights"], continued["weights"]):
        changed = {
            name for name, value in first.items() if value.numpy().tobytes() != weights[name].tobytes()
        }
        assert not {name for name in changed if ".layer.0." in name or "word_embeddings" in name}
        assert {"bert.encoder.layer.1.output.dense.weight", "classifier.weight", "scale"} <= changed


def test_a_run_continues_with_another_number_of_workers(results: Results) -> None:
    """Two workers, then one, then two: the loss of the last epoch is that of a run that kept two workers."""
    for curve, end in zip(results.together[:4], results.resharded, strict=True):
        assert end["continued_at"] == (1, 15)
        assert end["losses"][-1]["training_loss"] == pytest.approx(np.mean(curve["losses"][33:]), abs=1e-5)
        for name, weights in curve["weights"].items():
            assert weights == pytest.approx(end["weights"][name], abs=1e-4)


def test_checkpoints_are_encrypted_and_old_ones_are_removed(results: Results) -> None:
    """No file has readable words. A run keeps two checkpoints, and the best weights of each."""
    content = checkpoint_bytes(results.folder / "training_runs")
    assert len(content) > 10_000
    for word in (b"embedding", b"optimizer_state_dict", b"training_loss", b"half of a checkpoint"):
        assert word not in content
    assert len(results.files.checkpoints()) == 2
    assert results.files.names("best") == ["000000", "000001"]


def test_an_altered_checkpoint_is_skipped(results: Results) -> None:
    """It is not unpickled. The one before is used, and a warning names the other."""
    newest, previous = results.files.checkpoints()
    path = Path(results.files.root) / "checkpoints" / newest.text() / "rank-1"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found, warnings = find_checkpoint(results.files)
    path.write_bytes(content)
    assert found is not None
    assert found.name == previous
    assert newest.text() in warnings[0]
