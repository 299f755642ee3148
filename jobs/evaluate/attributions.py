"""How much each input contributes to a model's scores.

Trees: exact SHAP values by LightGBM's `pred_contrib` (Lundberg et al. 2018, arXiv 1802.03888), in units of the raw
score (log-odds for a binary task).

Other models: Shapley value sampling by Captum (Castro et al. 2009) against a typical row, in units of the score.
Captum's sampling only calls the model. So it works for each graph that a replica can run, also without a torch network,
and for categories, which have no gradient.

An attribution describes the model. It does not say what causes the label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.runtime import Model
from cluster.runtime.encoding import Matrix
from jobs.evaluate.robustness import matrix_positions, sample_rows

SHAP, SAMPLING = "tree SHAP (pred_contrib)", "Shapley value sampling (Captum)"
_ABSENT = np.finfo(np.float32).min
"""Stands for a missing value in Captum's tensors. Captum multiplies values by 0 and 1, and 0 times NaN is NaN."""


@dataclass(kw_only=True, slots=True)
class AttributionConfig:
    """Attribution of the scores to the inputs."""

    rows: int = 5000
    """At most this many rows for trees, drawn by the seed; 0 turns attributions off."""
    sampled_rows: int = 200
    """At most this many rows for other models."""
    samples: int = 10
    """Orders of the inputs that are drawn for other models. The work is rows x inputs x samples."""

    def __post_init__(self) -> None:
        if self.rows < 0 or self.sampled_rows < 1 or self.samples < 1:
            raise ValueError(
                "attributions.rows must not be negative; sampled_rows and samples must be at least 1."
            )


def attribute(model: Model, matrix: Matrix, config: AttributionConfig, *, seed: int) -> dict[str, Any]:
    """Return the mean absolute attribution of each input, the largest first, and the method.

    Args:
        model: The model.
        matrix: Encoded rows.
        config: Number of rows and draws.
        seed: Seed of the draws.
    """
    draw = np.random.default_rng(seed)
    contributions = getattr(model.engine, "contributions", None)
    if contributions is not None:
        rows = matrix[sample_rows(len(matrix), config.rows, draw)]
        by_column, method = contributions(rows), SHAP
    else:
        rows = matrix[sample_rows(len(matrix), min(config.rows, config.sampled_rows), draw)]
        by_column, method = sampled_contributions(model, rows, samples=config.samples, seed=seed), SAMPLING
    mean = {
        # A list's columns are one input, so their contributions of a row are added first. Last axis: scores.
        name: float(np.abs(by_column[:, positions].sum(axis=1)).mean())
        for name, positions in matrix_positions(model).items()
    }
    largest_first = dict(sorted(mean.items(), key=lambda item: -item[1]))
    return {"method": method, "rows": len(rows), "inputs": largest_first}


def sampled_contributions(model: Model, rows: Matrix, *, samples: int, seed: int) -> npt.NDArray[np.float64]:
    """Return the contributions of the columns by Shapley value sampling: [rows, columns, 1].

    The columns of one input are added and taken away together. Its contribution is in its first column. For several
    classes, the score is the probability of the class that the model predicts for the row.
    """
    import torch  # torch and Captum take seconds, so they are imported only here
    from captum.attr import ShapleyValueSampling

    positions = matrix_positions(model)
    inputs_of_columns = torch.zeros((1, rows.shape[1]), dtype=torch.int64)
    for number, places in enumerate(positions.values()):
        inputs_of_columns[0, places] = number
    predicted = _scores(model, rows).argmax(axis=1)

    def forward(tensor: torch.Tensor) -> torch.Tensor:
        matrix = tensor.numpy().copy()
        matrix[matrix == _ABSENT] = np.nan
        columns = np.tile(predicted, len(matrix) // len(predicted))  # Captum repeats the rows
        return torch.from_numpy(_scores(model, matrix)[np.arange(len(matrix)), columns])

    torch.manual_seed(seed)
    found = ShapleyValueSampling(forward).attribute(
        torch.from_numpy(_without_nan(rows)),
        baselines=torch.from_numpy(_without_nan(_typical_row(model, rows))),
        feature_mask=inputs_of_columns,
        n_samples=samples,
        perturbations_per_eval=16,
    )
    result = np.zeros((*rows.shape, 1))
    for places in positions.values():
        result[:, places[0], 0] = found[:, places[0]].numpy()
    return result


def _scores(model: Model, matrix: Matrix) -> npt.NDArray[np.float64]:
    return model.predict_matrix(matrix).scores.reshape(len(matrix), -1)


def _typical_row(model: Model, rows: Matrix) -> Matrix:
    """Return the median of each number and the most frequent code of each category: [1, columns]."""
    typical = np.full((1, rows.shape[1]), np.nan, dtype=np.float32)
    for position, spec in enumerate(model.signature.matrix_columns):
        known = rows[~np.isnan(rows[:, position]), position]
        if not len(known):
            continue
        if spec.categories is None:
            typical[0, position] = np.median(known)
        else:
            codes, counts = np.unique(known, return_counts=True)
            typical[0, position] = codes[counts.argmax()]
    return typical


def _without_nan(matrix: Matrix) -> Matrix:
    return np.where(np.isnan(matrix), _ABSENT, matrix).astype(np.float32)
