"""What a training run says of its data before it fits: rows, inputs, classes, and what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cluster.runtime import InputSpec, Task
from jobs.train.checks import check_rows
from jobs.train.config import LearningConfig
from jobs.train.data import Dataset, TrainingSet, prepare
from jobs.train.split import describe_split

SHOWN = 12
"""Names in a list, at most."""


class Prepared(NamedTuple):
    """A data set that a model can be fitted to."""

    dataset: Dataset
    warnings: list[str]
    """What to be wary of."""


def prepare_aloud(config: LearningConfig, source: TrainingSet, *, threshold: float = 0.5) -> Prepared:
    """Prepare and check a data set, and print what it is.

    Raises:
        TrainingSetError: it cannot be learned from.
    """
    dataset = prepare(config, source, threshold=threshold)
    print("\n".join(describe_data(config, source, dataset)), flush=True)
    warnings = check_rows(dataset)
    say(warnings)
    return Prepared(dataset, warnings)


def say(warnings: Sequence[str]) -> None:
    """Print each warning."""
    for warning in warnings:
        print(f"warning: {warning}", flush=True)


def describe_data(config: LearningConfig, source: TrainingSet, dataset: Dataset) -> list[str]:
    """Lines for people.

    Args:
        config: with its split resolved.
        source: the training set.
        dataset: what it became.
    """
    counts = [int(mask.sum()) for mask in (dataset.fit, dataset.validation, dataset.held_out)]
    split = describe_split(config.split, source.table)
    lines = [
        f"{source.table.num_rows} rows: {counts[0]} to fit on, {counts[1]} for early stopping, {counts[2]} held out "
        f"({split})",
        f"{len(dataset.signature.inputs)} inputs: {_some([_input(spec) for spec in dataset.signature.inputs])}",
        _label(dataset),
    ]
    apart = left_out(config, source, dataset.signature.columns)
    if apart:
        names = _some([f"{name} ({reason})" for name, reason in apart.items()])
        lines.append(f"not among the inputs: {names}; `inputs=[…]` chooses them by name")
    return lines


def left_out(config: LearningConfig, source: TrainingSet, inputs: list[str]) -> dict[str, str]:
    """Columns of a training set that nobody excluded and that are no inputs, with the reason."""
    if config.inputs is not None:
        return {}
    known = {*inputs, *config.exclude, config.label}
    return {
        field.name: _reason(field, config, source) for field in source.table.schema if field.name not in known
    }


def _reason(field: pa.Field, config: LearningConfig, source: TrainingSet) -> str:
    if field.name == config.split.column:
        return "the split goes by it"
    if field.name in source.join_keys:
        return "join key"
    if field.name == "event_timestamp" or pa.types.is_temporal(field.type):
        return "time"
    if source.manifest:
        return "in no feature view"
    return "identifier, by its name"


def _input(spec: InputSpec) -> str:
    return spec.name if spec.categories is None else f"{spec.name} ({len(spec.categories)} categories)"


def _label(dataset: Dataset) -> str:
    signature = dataset.signature
    target = dataset.target
    if signature.task is Task.regression:
        return f"label {signature.label}: from {target.min():.4g} to {target.max():.4g}, mean {target.mean():.4g}"
    shares = np.bincount(target.astype(np.int64), minlength=len(signature.classes or ())) / len(target)
    classes = [f"{name} ({share:.1%})" for name, share in zip(signature.classes or (), shares, strict=True)]
    return f"label {signature.label}: {len(classes)} classes, {_some(classes)}"


def _some(words: list[str]) -> str:
    more = f", … {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return f"{', '.join(words[:SHOWN])}{more}"
