"""Reference rows: encoded rows with the scores that the exporter computed for them.

The rows are drawn at random from the model's own ranges, so no row is a person's. The importer computes the scores
again. So a version is registered only if its scores here are those of the exporter, and the cost of int8 is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cluster.errors import ArtifactTampered, RefusedError
from cluster.runtime import Model, ModelSignature
from cluster.runtime.encoding import Matrix
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import LIGHTGBM_FILE, NETWORK_FILE
from jobs.promotion.statement import REFERENCE

NUM_ROWS = 256
MISSING_SHARE = 0.05
TOLERANCE = 1e-5
"""Absolute and relative tolerance between two machines' scores of one graph."""
MAX_INT8_DIFFERENCE = 0.1
"""Largest difference of an int8 score: of a probability, or as a share of the range of other scores."""
_INPUTS, _SCORES = "inputs", "scores"
_RANGES = "feature_infos="


def reference_rows(signature: ModelSignature, folder: Path) -> Matrix:
    """Return random rows in the ranges of a model, float32 [rows, inputs], with some missing values.

    Args:
        signature: The model's signature.
        folder: Folder with the model's files.
    """
    draw = np.random.default_rng(0)
    ranges = dict(_known_ranges(folder))
    columns = []
    for index, spec in enumerate(signature.matrix_columns):
        if spec.categories is not None and not spec.categories:
            columns.append(np.full(NUM_ROWS, np.nan, dtype=np.float32))
        elif spec.categories is not None:
            columns.append(draw.integers(0, len(spec.categories), NUM_ROWS).astype(np.float32))
        elif index in ranges:
            columns.append(draw.uniform(*ranges[index], NUM_ROWS).astype(np.float32))
        else:
            columns.append(
                (draw.normal(size=NUM_ROWS) * 10.0 ** draw.integers(0, 4, NUM_ROWS)).astype(np.float32)
            )
    matrix = np.column_stack(columns)
    matrix[draw.random(matrix.shape) < MISSING_SHARE] = np.nan
    return matrix


def _known_ranges(folder: Path) -> Iterator[tuple[int, tuple[float, float]]]:
    """Yield index and range of the numbers whose range the model's files name."""
    network, trees = folder / NETWORK_FILE, folder / LIGHTGBM_FILE
    if network.exists():
        shape = json.loads(network.read_bytes())
        for index, mean, scale in zip(shape["numeric"], shape["means"], shape["scales"], strict=True):
            yield index, (mean - 3 * scale, mean + 3 * scale)
    elif trees.exists():
        line = next((line for line in trees.read_text().splitlines() if line.startswith(_RANGES)), _RANGES)
        for index, text in enumerate(line.removeprefix(_RANGES).split(" ")):
            low, _, high = text.strip("[]").partition(":")
            if text.startswith("[") and math.isfinite(float(high) - float(low)):
                yield index, (float(low), float(high))


def write_reference(rows: Matrix, scores: Scores) -> bytes:
    """Return rows and scores as safetensors."""
    return bytes(save({_INPUTS: rows, _SCORES: scores}))


def read_reference(data: bytes) -> tuple[Matrix, Scores]:
    """Return rows and scores.

    Raises:
        ArtifactTampered: The data has another form.
    """
    try:
        tensors = load(data)
        rows, scores = tensors[_INPUTS], tensors[_SCORES]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactTampered(f"{REFERENCE} has no reference rows: {error}.") from error
    if rows.dtype != np.float32 or rows.ndim != 2 or (len(rows), len(scores)) != (NUM_ROWS, NUM_ROWS):
        raise ArtifactTampered(f"{REFERENCE} does not have {NUM_ROWS} reference rows of numbers.")
    return rows, scores


def require_same_scores(model: Model, rows: Matrix, expected: Scores) -> None:
    """Require that a model gives the exporter's scores on this machine.

    Raises:
        RefusedError: The scores differ.
    """
    actual = model.predict_matrix(rows).scores
    if actual.shape != expected.shape or not np.allclose(
        actual, expected, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True
    ):
        raise RefusedError(
            f"The model gives other scores here than where it was exported, on {len(rows)} reference rows. Compare "
            "the releases of both installations (lightgbm, onnxruntime)."
        )


def require_close_scores(cost: Mapping[str, float], float32: Scores, *, is_number: bool) -> None:
    """Require that int8 scores are close to the float32 scores.

    Args:
        cost: What `parity` returned.
        float32: The float32 scores.
        is_number: Whether a score is a number and not a probability. Then the range of the scores is the measure.

    Raises:
        RefusedError: They are not.
    """
    limit = MAX_INT8_DIFFERENCE * (float(np.ptp(float32)) if is_number else 1.0)
    if not cost["largest_score_difference"] <= limit:
        raise RefusedError(
            f"The int8 scores differ from the float32 scores by up to {cost['largest_score_difference']:.2g}, and at "
            f"most {limit:.2g} is allowed. Import the version with precision=exported."
        )


def parity(float32: Scores, int8: Scores) -> dict[str, float | int]:
    """Return how far the int8 scores differ from the float32 scores."""
    difference = np.abs(int8 - float32)
    return {
        "rows": len(float32),
        "mean_score_difference": float(difference.mean()),
        "largest_score_difference": float(difference.max()),
    }


def describe_parity(cost: Mapping[str, float]) -> str:
    """Return the differences that `parity` returned as text."""
    mean, largest = cost["mean_score_difference"], cost["largest_score_difference"]
    return f"{mean:.2g} on average, at most {largest:.2g}"
