"""The guardrail of a rollout compares realised performance of the treatment with that of the concurrent control.

It compares point estimates, with a fixed tolerance and a minimum number of outcomes. It makes no claim about error
rates. With too little data there is no verdict, so never a success. An outcome that is not of the model's type (not one
of its classes, not a number) is ignored. Otherwise, a single such outcome could prevent the rollback of a bad version.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from cluster.records.reading import INVALID_OUTCOME
from cluster.runtime.outcome_parser import OutcomeParser
from cluster.runtime.signature import ModelSignature, Task


class Verdict(enum.StrEnum):
    """Result of the guardrail."""

    too_few = "too_few"
    holds = "holds"
    breached = "breached"
    undefined = "undefined"
    """There are enough outcomes, but the metric is undefined, because all outcomes are one class or one number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The guardrail's verdict, and the figures that it is based on."""

    verdict: Verdict
    metric: str
    treatment: float | None
    control: float | None
    treatment_outcomes: int
    """Number of outcomes of the model's type, in each arm. Other outcomes are ignored."""
    control_outcomes: int
    odd_outcomes: int = 0
    """Number of outcomes of both arms that are not of the model's type."""
    unknown_outcomes: int = 0
    """Number of outcomes of the whole model whose prediction or row is not in the log."""
    treatment_failures: int = 0
    """Number of rows without a finite score. They have no outcome, and no other figure includes them."""
    control_failures: int = 0
    logs: dict[str, Any] = field(default_factory=dict)
    """Up to which time the logs of predictions and outcomes are complete."""


def judge(matched: pl.DataFrame, *, signature: ModelSignature, min_outcomes: int, max_drop: float) -> Finding:
    """Compare the arms of one rollout.

    Args:
        matched: predictions with their outcomes: `arm`, `outcome`, and the column of the task (`probability`, `label`
            or `value`).
        signature: the model's signature. The metric is ROC AUC for a binary task, accuracy for multiclass, R² for
            regression.
        min_outcomes: number of outcomes that each arm needs for a verdict.
        max_drop: how far the treatment's metric may be below the control's metric.
    """
    task = signature.task
    arms_only = matched.filter(pl.col("arm").is_in(["treatment", "control"]))
    odd = int(arms_only[INVALID_OUTCOME].sum()) if INVALID_OUTCOME in matched.columns else 0
    usable = matched.with_columns(pl.Series(TRUTH, truths(matched["outcome"], signature), dtype=pl.Float64))
    usable = usable.filter(pl.col(TRUTH).is_not_null())
    arms = {arm: usable.filter(pl.col("arm") == arm) for arm in ("treatment", "control")}
    counts = {arm: frame.height for arm, frame in arms.items()}
    scores = {
        arm: score(frame, signature) if counts[arm] >= min_outcomes else None for arm, frame in arms.items()
    }
    treatment, control = scores["treatment"], scores["control"]
    if min(counts.values()) < min_outcomes:
        verdict = Verdict.too_few
    elif treatment is None or control is None:
        verdict = Verdict.undefined
    else:
        verdict = Verdict.breached if treatment < control - max_drop else Verdict.holds
    return Finding(
        verdict=verdict,
        metric=METRICS[task],
        treatment=treatment,
        control=control,
        treatment_outcomes=counts["treatment"],
        control_outcomes=counts["control"],
        odd_outcomes=odd,
    )


METRICS = {Task.binary: "roc_auc", Task.multiclass: "accuracy", Task.regression: "r2"}
TRUTH = "_truth"


def truths(values: pl.Series, signature: ModelSignature) -> list[float | None]:
    """Convert values to the position of a class, or to a finite number. Any other value becomes None."""
    types = OutcomeParser(signature)
    converted = [None if value is None else types.parse(value) for value in values.to_list()]
    if signature.classes is None:
        return [None if value is None else float(value) for value in converted]
    positions = {name: float(position) for position, name in enumerate(signature.classes)}
    return [None if value is None else positions[value] for value in converted]


def score(frame: pl.DataFrame, signature: ModelSignature) -> float | None:
    """Return the task's metric (higher is better), or None if the metric is undefined."""
    truth = frame[TRUTH].to_numpy()
    match signature.task:
        case Task.binary:
            if len(np.unique(truth)) < 2:
                return None
            from sklearn.metrics import roc_auc_score  # imported here, so that a rollback does not wait

            return float(roc_auc_score(truth, frame["probability"].to_numpy()))
        case Task.multiclass:
            labels = np.array(truths(frame["label"], signature), dtype=float)
            return float((truth == labels).mean())
        case Task.regression:
            spread = float(((truth - truth.mean()) ** 2).sum())
            if spread == 0:
                return None
            # The square of an answer may overflow; that of an outcome cannot. Such a version gets the lowest metric.
            with np.errstate(over="ignore"):
                squared_error = float(((truth - frame["value"].to_numpy()) ** 2).sum())
            return max(1 - squared_error / spread, -sys.float_info.max)
