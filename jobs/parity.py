"""How far the scores of two forms of one model differ, such as a network, its ONNX graph and its int8 graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.errors import RefusedError
from cluster.runtime import Precision
from cluster.runtime.predictions import Scores

MAX_FLOAT32, MAX_INT8 = 1e-4, 0.1
"""Largest difference of a score: of a probability, or as a share of the range of the scores of a regression."""


def compare_scores(
    original: Scores, other: Scores, *, precision: Precision, is_number: bool, bound: float | None = None
) -> dict[str, Any]:
    """Return the differences of two models' scores on the same rows, and the largest difference that is allowed.

    Args:
        original: Scores of the original model.
        other: Scores of the model that was made from it.
        precision: Precision of the other model.
        is_number: Whether a score is a number and not a probability. Then the range of the scores is the measure.
        bound: Largest difference that is allowed; None takes the bound of the precision.
    """
    differences = np.abs(other - original.reshape(other.shape))
    if bound is None:
        bound = MAX_INT8 if precision is Precision.int8 else MAX_FLOAT32
    return {
        "precision": precision.value,
        "rows": len(original),
        "mean_score_difference": float(differences.mean()),
        "largest_score_difference": float(differences.max()),
        "bound": bound * (max(1.0, float(np.ptp(original))) if is_number else 1.0),
    }


def require_parity(parity: dict[str, Any], *, model: str) -> None:
    """Require that the scores are close.

    Args:
        parity: What `compare_scores` returned; may be empty.
        model: Name of the model, for the error message.

    Raises:
        RefusedError: They differ by more than the bound.
    """
    if parity and not parity["largest_score_difference"] <= parity["bound"]:
        raise RefusedError(
            f"The {parity['precision']} ONNX graph of {model} gives scores that differ from the original by up to "
            f"{parity['largest_score_difference']:.2g} on {parity['rows']} rows; at most {parity['bound']:.2g} is "
            "allowed. "
            + (
                "Train it with model.precision=float32."
                if parity["precision"] == Precision.int8.value
                else "Export the graph again."
            )
        )
