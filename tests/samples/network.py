"""A tabular network with untrained weights, as a folder of model files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from cluster.runtime import ModelSignature, Precision, Task
from cluster.runtime.encoding import Matrix
from cluster.runtime.signature import SIGNATURE_FILE
from cluster.runtime.tabular_network import NetworkShape, TabularNetwork
from jobs.train.quantise import quantise
from jobs.train.tabular_network.export import export


def write_network(folder: Path, signature: ModelSignature, *, width: int = 16, depth: int = 2) -> None:
    """Write the same files as training, in the precision of the signature."""
    folder.mkdir(parents=True)
    shape = shape_of(signature, width=width, depth=depth)
    torch.manual_seed(0)
    weights = folder.parent / f"{folder.name}.weights"
    state = TabularNetwork(shape).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, str(weights))
    export(shape, weights, folder, sample=rows(signature, 8))
    weights.unlink()
    if signature.precision is Precision.int8:
        quantise(folder)
    (folder / SIGNATURE_FILE).write_text(signature.to_json())


def shape_of(signature: ModelSignature, *, width: int, depth: int) -> NetworkShape:
    categorical = signature.categorical
    numeric = [place for place in range(len(signature.inputs)) if place not in categorical]
    regression = signature.task is Task.regression
    return NetworkShape(
        task=signature.task.value,
        num_outputs=signature.num_scores,
        categorical=categorical,
        cardinalities=[len(signature.inputs[place].categories or ()) for place in categorical],
        numeric=numeric,
        means=[40.0] * len(numeric),
        scales=[20.0] * len(numeric),
        target_mean=100.0 if regression else 0.0,
        target_scale=10.0 if regression else 1.0,
        width=width,
        depth=depth,
        embedding_dim=4,
        dropout=0.1,
    )


def rows(signature: ModelSignature, count: int, *, seed: int = 0) -> Matrix:
    """Return `count` encoded rows. One of ten values is missing."""
    draw = np.random.default_rng(seed)
    columns = [
        draw.normal(40, 20, count)
        if spec.categories is None
        else draw.integers(0, len(spec.categories), count)
        for spec in signature.inputs
    ]
    matrix = np.column_stack(columns).astype(np.float32)
    matrix[draw.random(matrix.shape) < 0.1] = np.nan
    return matrix


def as_int8(signature: ModelSignature) -> ModelSignature:
    return replace(signature, precision=Precision.int8)
