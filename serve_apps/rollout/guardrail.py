"""The first, simple rule of a rollout: realised performance of the treatment against its concurrent control.

It compares point estimates with a fixed tolerance and a smallest number of outcomes; it makes no claim about error
rates. No data is no verdict, never a success.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import polars as pl
from sklearn.metrics import roc_auc_score

from cluster.runtime.signature import Task


class Verdict(enum.StrEnum):
    """What the rule says."""

    too_few = "too_few"
    holds = "holds"
    breached = "breached"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The rule's verdict and the figures behind it."""

    verdict: Verdict
    metric: str
    treatment: float | None
    control: float | None
    treatment_outcomes: int
    control_outcomes: int


def judge(matched: pl.DataFrame, *, task: Task, min_outcomes: int, max_drop: float) -> Finding:
    """Compare the arms of one rollout.

    Args:
        matched: predictions with their outcomes: `arm`, `outcome`, and the columns of the task (`probability`; or
            `label`; or `value`).
        task: binary compares ROC AUC, multiclass accuracy, regression R².
        min_outcomes: in each arm, below which there is no verdict.
        max_drop: how far the treatment's metric may lie below the control's.
    """
    arms = {arm: matched.filter(pl.col("arm") == arm) for arm in ("treatment", "control")}
    counts = {arm: frame.height for arm, frame in arms.items()}
    scores = {arm: score(frame, task) if counts[arm] >= min_outcomes else None for arm, frame in arms.items()}
    treatment, control = scores["treatment"], scores["control"]
    if treatment is None or control is None:
        verdict = Verdict.too_few
    else:
        verdict = Verdict.breached if treatment < control - max_drop else Verdict.holds
    return Finding(
        verdict=verdict,
        metric=METRICS[task],
        treatment=treatment,
        control=control,
        treatment_outcomes=counts["treatment"],
        control_outcomes=counts["control"],
    )


METRICS = {Task.binary: "roc_auc", Task.multiclass: "accuracy", Task.regression: "r2"}


def score(frame: pl.DataFrame, task: Task) -> float | None:
    """The task's metric, higher is better; none where it is not defined."""
    match task:
        case Task.binary:
            # The positive class is the one answered at high probability, so its name need not be known here.
            outcome = frame["outcome"].cast(pl.Int8).to_numpy()
            if len(np.unique(outcome)) < 2:
                return None
            return float(roc_auc_score(outcome, frame["probability"].to_numpy()))
        case Task.multiclass:
            right = frame["outcome"].cast(pl.String) == frame["label"].cast(pl.String)
            return int(right.sum()) / frame.height
        case Task.regression:
            truth, value = frame["outcome"].to_numpy(), frame["value"].to_numpy()
            spread = float(((truth - truth.mean()) ** 2).sum())
            return None if spread == 0 else 1 - float(((truth - value) ** 2).sum()) / spread
