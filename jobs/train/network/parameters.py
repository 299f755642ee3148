"""Check the hyper-parameters of Falaj's own networks."""

from __future__ import annotations

import math
from typing import Any


def check_parameters(parameters: Any, *, counts: tuple[str, ...], shares: tuple[str, ...]) -> None:
    """Check the hyper-parameters that have the same bounds in each family.

    Args:
        parameters: Hyper-parameters with `epochs`, `batch_size`, `learning_rate` and `weight_decay`.
        counts: Names of further hyper-parameters that are at least 1.
        shares: Names of hyper-parameters from 0 to below 1, for example dropout.
    """
    for name in (*counts, "epochs", "batch_size"):
        value = getattr(parameters, name)
        if value is not None and value < 1:
            raise ValueError(f"model.{name} must be at least 1, got {value}.")
    if not 0 < parameters.learning_rate < 1:
        raise ValueError(f"model.learning_rate must be between 0 and 1, got {parameters.learning_rate}.")
    if not 0 <= parameters.weight_decay < math.inf:
        raise ValueError(
            f"model.weight_decay must be finite and not negative, got {parameters.weight_decay}."
        )
    for name in shares:
        if not 0 <= getattr(parameters, name) < 1:
            raise ValueError(f"model.{name} must be between 0 and 1, got {getattr(parameters, name)}.")
