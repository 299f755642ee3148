"""How much the main metric falls if inputs are missing or shifted.

Inputs are changed in the model's matrix, so the same way for every family:

- `missing`: the input is missing in all rows.
- `shifted`: numbers are moved up by one standard deviation. Categories are exchanged between rows, so that each value
  stays as frequent as it is, but belongs to another row.
- `some_missing`: each value of each input is missing with a probability of 10 % or 30 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.runtime import Model
from cluster.runtime.encoding import Matrix
from jobs.evaluate.rows import ScoredRows
from jobs.metrics import headline_metric, score

SHARES = (0.1, 0.3)


@dataclass(kw_only=True, slots=True)
class RobustnessConfig:
    """Test of a model with missing and shifted inputs."""

    rows: int = 5000
    """At most this many rows, drawn by the seed; 0 turns the test off."""
    inputs: int = 30
    """At most this many inputs are changed alone: those with the largest attribution."""

    def __post_init__(self) -> None:
        if self.rows < 0 or self.inputs < 0:
            raise ValueError("robustness.rows and robustness.inputs must not be negative.")


def measure_robustness(
    model: Model, rows: ScoredRows, config: RobustnessConfig, *, important: list[str], seed: int
) -> dict[str, Any]:
    """Return the main metric of a sample of the rows, unchanged and with each change.

    Args:
        model: The model.
        rows: The evaluated rows.
        config: Size of the test.
        important: Names of all inputs, the most important first.
        seed: Seed of the draws.
    """
    draw = np.random.default_rng(seed)
    sample = sample_rows(len(rows.matrix), config.rows, draw)
    matrix, target = rows.matrix[sample], rows.target[sample]
    metric = headline_metric(model.signature.task)

    def measure(changed: Matrix) -> float | None:
        value: float | None = score(model.predict_matrix(changed).require_finite(), target)[metric]
        return value

    positions = matrix_positions(model)
    return {
        "metric": metric,
        "rows": len(sample),
        "unchanged": measure(matrix),
        "missing": {name: measure(_missing(matrix, positions[name])) for name in important[: config.inputs]},
        "shifted": {
            name: measure(_shifted(matrix, positions[name], model, draw))
            for name in important[: config.inputs]
        },
        "some_missing": {f"{share:.0%}": measure(_some_missing(matrix, share, draw)) for share in SHARES},
    }


def sample_rows(rows: int, size: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the positions of at most `size` rows, in order."""
    return np.sort(draw.choice(rows, size, replace=False)) if rows > size else np.arange(rows)


def matrix_positions(model: Model) -> dict[str, list[int]]:
    """Return the positions of each input's columns in the matrix. A list has several columns."""
    positions: dict[str, list[int]] = {}
    for position, spec in enumerate(model.signature.matrix_columns):
        positions.setdefault(spec.name, []).append(position)
    return positions


def _missing(matrix: Matrix, positions: list[int]) -> Matrix:
    changed = matrix.copy()
    changed[:, positions] = np.nan
    return changed


def _shifted(matrix: Matrix, positions: list[int], model: Model, draw: np.random.Generator) -> Matrix:
    changed = matrix.copy()
    if model.signature.matrix_columns[positions[0]].categories is not None:
        changed[:, positions] = matrix[draw.permutation(len(matrix))][:, positions]
        return changed
    for position in positions:
        known = matrix[~np.isnan(matrix[:, position]), position].astype(np.float64)
        changed[:, position] += np.float32(known.std() if len(known) else 0.0)
    return changed


def _some_missing(matrix: Matrix, share: float, draw: np.random.Generator) -> Matrix:
    changed = matrix.copy()
    changed[draw.random(matrix.shape) < share] = np.nan
    return changed
