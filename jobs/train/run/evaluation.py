"""Evaluate a fitted model on the held-out rows, row group by row group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster.errors import ConfigError
from cluster.runtime import ModelSignature, Precision, Predictions, open_model
from cluster.runtime.device_choice import Hardware
from cluster.runtime.predictions import check_scores
from cluster.runtime.signature import SIGNATURE_FILE
from jobs.metrics import score
from jobs.train.rows.encoded import Part
from jobs.train.training_data import TrainingData


class HeldOutResult(NamedTuple):
    """Metrics and warnings of a model on the held-out rows."""

    metrics: dict[str, Any]
    warnings: list[str]


def evaluate_held_out(folder: Path, data: TrainingData, precision: Precision) -> HeldOutResult:
    """Write the model's signature into the model folder, and evaluate the model on the held-out rows.

    With the precision int8, the model is quantised and the int8 model is evaluated. The metrics then also have
    `quantised_from`: the metrics of the float32 model, and how far the scores of both models differ.

    Raises:
        ConfigError: The model cannot be quantised to int8.
    """
    float32 = predict_part(folder, data, data.signature)
    target = data.target[data.held_out]
    metrics = score(float32, target)
    is_constant = len(float32.scores) > 1 and bool((float32.scores == float32.scores[0]).all())
    warnings = ["the model gives all held-out rows the same score: it learned nothing"] if is_constant else []
    if precision is Precision.float32:
        return HeldOutResult(metrics, warnings)
    from jobs.train.quantise import quantisation_cost, quantise  # imports ONNX and ONNX Runtime

    quantise(folder)
    int8 = predict_part(folder, data, replace(data.signature, precision=precision))
    cost = quantisation_cost(float32, int8, metrics)
    return HeldOutResult(score(int8, target) | {"quantised_from": cost}, warnings)


def predict_part(
    folder: Path, data: TrainingData, signature: ModelSignature, *, part: Part = Part.held_out
) -> Predictions:
    """Write the signature into the model folder, load the model and predict the rows of one part of the split.

    Raises:
        RefusedError: The files are no valid model, or the scores do not fit the task.
    """
    (folder / SIGNATURE_FILE).write_text(signature.to_json())
    model = open_model(folder, hardware=Hardware(num_threads=2))
    counts = data.rows.counts(part)
    parts = [
        model.predict_matrix(data.rows.read(group).of(part).matrix).scores
        for group, count in enumerate(counts)
        if count
    ]
    predictions = Predictions(signature=signature, scores=np.concatenate(parts))
    check_scores(predictions)
    return predictions


def requested_precision(parameters: Any) -> Precision:
    """Return the precision to register the model with. It is float32 for a family without the parameter `precision`.

    Raises:
        ConfigError: A user's own family declares `precision` with another type.
    """
    precision = getattr(parameters, "precision", Precision.float32)
    if not isinstance(precision, Precision):
        raise ConfigError(f"model.precision must be a cluster.runtime.Precision, got {precision!r}.")
    return precision
