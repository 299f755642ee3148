"""A user's own network needs `build` and `loss`. A family with `fit` gets its rows in memory, up to a limit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from cluster.runtime import Task
from cluster.runtime.onnx_engine import OnnxEngine
from jobs.train.config import DeepSpeedConfig, LearningConfig
from jobs.train.data import TrainingSet
from jobs.train.families import resolve_family
from jobs.train.network.engine import checkpoint_activations, deepspeed_config
from jobs.train.network.plan import LoopConfig, Steps
from jobs.train.network.protocol import export_network, network_signature
from jobs.train.training_data import TrainingData, prepare_rows, require_room
from tests.samples import frozen_network, hugging_face
from tests.unit.jobs.train.conftest import people

MODULE = frozen_network.__name__


def prepared(task: Task = Task.binary) -> TrainingData:
    config = LearningConfig(name="m", training_set="t", label="y", task=task)
    return prepare_rows(config, TrainingSet(table=people(500), manifest={}, hash="h"))


def test_a_module_with_build_and_loss_is_a_network() -> None:
    """Other nodes may fit it, because it reads its rows with the caller's keys."""
    family = resolve_family({"family": "mine", "module": MODULE, "epochs": 3})
    assert family.is_network
    assert family.runs_anywhere
    assert family.parameters.epochs == 3
    assert not resolve_family({"family": "lightgbm"}).is_network


@pytest.mark.parametrize("task", [Task.binary, Task.multiclass, Task.regression])
def test_a_network_without_an_export_becomes_a_graph_with_scores(tmp_path: Path, task: Task) -> None:
    """Probabilities, or values in the label's unit. `export_network` compares the graph with the network."""
    data = prepared(task)
    signature, parameters = network_signature(data), frozen_network.Parameters()
    weights = frozen_network.build(signature, parameters).state_dict()
    sample = data.rows.read(0).matrix[:8]
    export_network(frozen_network, signature, parameters, weights, folder=tmp_path, sample=sample)
    scores = OnnxEngine((tmp_path / "model.onnx").read_bytes()).scores(sample)
    assert scores.shape == ((8, 2) if task is Task.multiclass else (8,))
    if task is Task.multiclass:
        assert scores.sum(axis=1) == pytest.approx(np.ones(8))


def test_a_hugging_face_model_becomes_a_graph(tmp_path: Path) -> None:
    """`export_network` compares the graph with the model, also on another number of rows."""
    data = prepared()
    signature, parameters = network_signature(data), hugging_face.Parameters()
    weights = hugging_face.build(signature, parameters).state_dict()
    sample = data.rows.read(0).matrix[:8]
    export_network(hugging_face, signature, parameters, weights, folder=tmp_path, sample=sample)
    assert OnnxEngine((tmp_path / "model.onnx").read_bytes()).scores(sample).shape == (8,)


def test_the_target_fits_the_loss() -> None:
    """float32 for a binary task, int64 for classes, standardised float32 for a regression."""
    target = np.array([0, 1, 1])
    encoded = [network_signature(prepared(task)).encode_target(target).dtype for task in Task]
    assert dict(zip(Task, encoded, strict=True)) == {
        Task.binary: torch.float32,
        Task.multiclass: torch.int64,
        Task.regression: torch.float32,
    }


def test_rows_that_do_not_fit_into_memory_are_refused() -> None:
    """The message names the protocol of networks."""
    data: Any = SimpleNamespace(parts=range(20_000_000), signature=SimpleNamespace(width=40))
    with pytest.raises(ConfigError, match=r"3\.0 GiB.*build"):
        require_room(data)
    require_room(prepared())


def test_settings_reach_deepspeed() -> None:
    """Batch, accumulation, clipping and offload; bfloat16 only on a GPU."""

    def settings(device: str, **deepspeed: Any) -> dict[str, Any]:
        config = LoopConfig(
            module=MODULE,
            parameters=frozen_network.Parameters(),
            signature=network_signature(prepared()),
            batches=None,
            steps=Steps(epochs=1, steps=1, batch_rows=120),
            deepspeed=DeepSpeedConfig(**deepspeed),
            seed=0,
            device=device,
        )
        return deepspeed_config(config, workers=2)

    plain = settings("cpu", zero_stage=2, offload=True, gradient_accumulation=3, gradient_clipping=0.5)
    assert plain["train_micro_batch_size_per_gpu"] == 20
    assert plain["gradient_accumulation_steps"] == 3
    assert plain["gradient_clipping"] == 0.5
    assert plain["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert "torch_autocast" not in plain
    assert settings("cuda")["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=r"offload=true needs deepspeed\.zero_stage"):
        DeepSpeedConfig(zero_stage=0, offload=True)


def test_activation_checkpointing_needs_blocks() -> None:
    """A network without a ModuleList is refused, and the message names the setting."""
    with pytest.raises(ConfigError, match=r"deepspeed\.activation_checkpointing=false"):
        checkpoint_activations(torch.nn.Linear(2, 2))
