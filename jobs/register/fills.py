"""Values that replace missing values in a graph that cannot take them.

A model of the platform must give a score for a row with missing values. Many estimators of scikit-learn do not. So a
missing number is replaced by the median of the reference rows, and a missing text by the most frequent one. The values
are constants of the registered graph, and the version has a warning that names them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cluster.runtime import ModelSignature
from cluster.runtime.encoding import Matrix
from jobs.register.artifact import WHOLE, Artifact

SHOWN = 12
"""A warning names at most this many inputs."""


def whole_positions(artifact: Artifact, signature: ModelSignature) -> list[int]:
    """Return the positions of the columns whose type in the graph has no missing value."""
    types = [one.type for one in artifact.inputs]
    if len(types) == 1:
        types = types * len(signature.inputs)
    return [position for position, element in enumerate(types) if element in WHOLE]


def typical_values(matrix: Matrix, signature: ModelSignature, positions: list[int]) -> dict[int, float]:
    """Return the median, or the most frequent code, of each of these columns. A column without values has 0."""
    fills = {}
    for position in positions:
        known = matrix[~np.isnan(matrix[:, position]), position]
        if not len(known):
            fills[position] = 0.0
        elif signature.inputs[position].categories is None and signature.inputs[position].dtype != "bool":
            # A value that occurs, so that a whole number stays whole.
            fills[position] = float(np.quantile(known, 0.5, method="lower"))
        else:
            codes, counts = np.unique(known, return_counts=True)
            fills[position] = float(codes[counts.argmax()])
    return fills


def fill_warning(fills: Mapping[int, float], signature: ModelSignature) -> list[str]:
    """Return the warning about filled values; empty if there are none."""
    if not fills:
        return []
    texts = [_describe(signature, position, value) for position, value in fills.items()]
    more = f", … {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return [
        "the graph gives no score for missing values, so they are replaced by typical values of the reference: "
        f"{', '.join(texts[:SHOWN])}{more}"
    ]


def _describe(signature: ModelSignature, position: int, value: float) -> str:
    spec = signature.inputs[position]
    shown = (
        f"{value:.6g}"
        if spec.categories is None
        else repr(spec.categories[int(value)])
        if spec.categories
        else ""
    )
    return f"{spec.name} = {shown}"
