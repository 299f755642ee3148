"""The first, simple rule of a rollout: realised performance of the treatment against its concurrent control.

It compares point estimates with a fixed tolerance and a smallest number of outcomes; it makes no claim about error
rates. No data is no verdict, never a success. An outcome that the model cannot have meant (no class of it, no number)
is passed over: whoever may post outcomes must not be able to keep a bad version in place with one of them.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass

import numpy as np
import polars as pl

from cluster.records.reading import ODD
from cluster.runtime.signature import ModelSignature, Task
from cluster.runtime.truths import Truths


class Verdict(enum.StrEnum):
    """What the rule says."""

    too_few = "too_few"
    holds = "holds"
    breached = "breached"
    undefined = "undefined"
    """There are outcomes enough, but the metric says nothing of them: all are of one class, or one number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The rule's verdict and the figures behind it."""

    verdict: Verdict
    metric: str
    treatment: float | None
    control: float | None
    treatment_outcomes: int
    """That count: those which the model can have meant."""
    control_outcomes: int
    odd_outcomes: int = 0
    """Of either arm, that the model cannot have meant."""
    unknown_outcomes: int = 0
    """Of the whole model, for answers or rows that nobody logged."""
    treatment_failures: int = 0
    """Rows that the version gave no finite score for; they have no outcome and are in no figure."""
    control_failures: int = 0


def judge(matched: pl.DataFrame, *, signature: ModelSignature, min_outcomes: int, max_drop: float) -> Finding:
    """Compare the arms of one rollout.

    Args:
        matched: predictions with their outcomes: `arm`, `outcome`, and the columns of the task (`probability`; or
            `label`; or `value`).
        signature: binary compares ROC AUC, multiclass accuracy, regression R².
        min_outcomes: in each arm, below which there is no verdict.
        max_drop: how far the treatment's metric may lie below the control's.
    """
    task = signature.task
    arms_only = matched.filter(pl.col("arm").is_in(["treatment", "control"]))
    odd = int(arms_only[ODD].sum()) if ODD in matched.columns else 0
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
    """Values as the task compares them: a class's position, or a finite number; null for anything else."""
    meant = Truths(signature)
    found = [None if value is None else meant.of(value) for value in values.to_list()]
    if signature.classes is None:
        return [None if value is None else float(value) for value in found]
    positions = {name: float(position) for position, name in enumerate(signature.classes)}
    return [None if value is None else positions[value] for value in found]


def score(frame: pl.DataFrame, signature: ModelSignature) -> float | None:
    """The task's metric, higher is better; none where it is not defined."""
    truth = frame[TRUTH].to_numpy()
    match signature.task:
        case Task.binary:
            if len(np.unique(truth)) < 2:
                return None
            from sklearn.metrics import roc_auc_score  # a rollback by command should not wait for its import

            return float(roc_auc_score(truth, frame["probability"].to_numpy()))
        case Task.multiclass:
            labels = np.array(truths(frame["label"], signature), dtype=float)
            return float((truth == labels).mean())
        case Task.regression:
            spread = float(((truth - truth.mean()) ** 2).sum())
            if spread == 0:
                return None
            with np.errstate(
                over="ignore"
            ):  # outcomes have finite squares, answers need not: no version is worse
                wrong = float(((truth - frame["value"].to_numpy()) ** 2).sum())
            return max(1 - wrong / spread, -sys.float_info.max)
