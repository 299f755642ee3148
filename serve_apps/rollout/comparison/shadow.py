"""Compare the answers of a shadow with those that clients got for the same requests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from cluster.ledger import Ledger
from cluster.records.location import outcome_log, prediction_log
from cluster.records.matching import match_outcomes
from cluster.records.progress import ages_as_json, log_age
from cluster.records.reading import iter_outcomes, read_log, read_shadow_predictions
from cluster.registry import Registry
from cluster.runtime import OutcomeParser
from cluster.runtime.loader import load_signature
from cluster.runtime.signature import ModelSignature, Task
from cluster.security.acting import Actor
from cluster.security.keys.access import key_store
from cluster.storage import layout
from serve_apps.rollout.comparison.guardrail import METRICS, TRUTH, score, truths
from serve_apps.rollout.config import RolloutConfig

_KEYS = ("request_id", "row")
_SHADOW_SUFFIX = "_of_shadow"
"""Suffix of the shadow's columns in a joined frame."""
_ANSWER = ("probability", "label", "value")
_VALUES = {Task.binary: "probability", Task.regression: "value"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowComparison:
    """Figures over the rows that the shadow and a served version have both answered."""

    version: int = 0
    """The shadow's version."""
    rows: int = 0
    equal_labels: float | None = None
    """Share of rows for which both gave the same label. None for a regression, or without rows."""
    mean_difference: float | None = None
    """Mean distance of both probabilities, or of both values. None for a multiclass model, or without rows."""
    outcomes: int = 0
    """Number of these rows that have an outcome."""
    metric: str
    shadow: float | None = None
    """The metric over the rows with outcomes. None if it is undefined."""
    served: float | None = None
    logs: dict[str, Any] = field(default_factory=dict)
    """Up to which time the logs of predictions and outcomes are complete."""


def compare_shadow(config: RolloutConfig, ledger: Ledger, actor: Actor, version: int) -> ShadowComparison:
    """Read the logs of a model, and compare its shadow with the versions that answered the same requests.

    Args:
        config: Names the model.
        ledger: The ledger.
        actor: The caller, whose keys decrypt the logs.
        version: The shadow's version.
    """
    places, store = layout(config.storage), key_store(actor.access)
    registry = Registry(ledger, places)
    predictions, outcomes = (of(places, ledger, config.name) for of in (prediction_log, outcome_log))
    ages = ages_as_json([log_age(predictions), log_age(outcomes)])
    copies = read_shadow_predictions(predictions, store).filter(pl.col("version") == version)
    answers = read_log(predictions, store).answers
    signature = load_signature(registry.get(config.name, version), store)
    if copies.is_empty() or answers.is_empty():
        return ShadowComparison(version=version, metric=METRICS[signature.task], logs=ages)
    numbers = answers["version"].unique().to_list()
    parsers = {
        number: OutcomeParser(load_signature(registry.get(config.name, number), store)) for number in numbers
    }
    matched = match_outcomes(answers, iter_outcomes(outcomes, store), parsers).answers
    columns = [name for name in _ANSWER if name in copies.columns]
    joined = matched.join(copies.select(*_KEYS, *columns), on=_KEYS, suffix=_SHADOW_SUFFIX)
    of_shadow = joined.select("outcome", *(pl.col(name + _SHADOW_SUFFIX).alias(name) for name in columns))
    return replace(compare(joined, of_shadow, signature), version=version, logs=ages)


def compare(served: pl.DataFrame, shadow: pl.DataFrame, signature: ModelSignature) -> ShadowComparison:
    """Compare two frames of answers to the same rows, in the same order. `served` has the outcomes."""
    task, metric = signature.task, METRICS[signature.task]
    if served.is_empty():
        return ShadowComparison(metric=metric)
    equal = difference = None
    if task is not Task.regression:
        labels = (truths(frame["label"], signature) for frame in (served, shadow))
        equal = float(np.mean([one == other for one, other in zip(*labels, strict=True)]))
    if task in _VALUES:
        difference = float((served[_VALUES[task]] - shadow[_VALUES[task]]).abs().mean())  # type: ignore[arg-type]
    truth = pl.Series(TRUTH, truths(served["outcome"], signature), dtype=pl.Float64)
    known = [frame.with_columns(truth).filter(truth.is_not_null()) for frame in (served, shadow)]
    scores = [score(frame, signature) if frame.height else None for frame in known]
    return ShadowComparison(
        rows=served.height,
        equal_labels=equal,
        mean_difference=difference,
        outcomes=known[0].height,
        metric=metric,
        served=scores[0],
        shadow=scores[1],
    )
