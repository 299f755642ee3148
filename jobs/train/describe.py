"""Describe the data of a training run before the fit: rows, inputs, classes and unused columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cluster.runtime import InputSpec, Task
from jobs.train.checks import check_rows
from jobs.train.config import LearningConfig
from jobs.train.data import TrainingSet
from jobs.train.split import describe_split
from jobs.train.training_data import TrainingData, prepare_rows

SHOWN = 12
"""A printed list has at most this many names."""


class Prepared(NamedTuple):
    """A data set that is ready for a fit, and the warnings about the data."""

    data: TrainingData
    warnings: list[str]


def prepare_and_describe(config: LearningConfig, source: TrainingSet, *, threshold: float = 0.5) -> Prepared:
    """Prepare and check a data set, and print its description and warnings.

    Raises:
        TrainingSetError: A model cannot be fitted to the data, or not be evaluated on it.
    """
    data = prepare_rows(config, source, threshold=threshold)
    print("\n".join(describe_data(config, source, data)), flush=True)
    warnings = check_rows(data)
    print_warnings(warnings)
    return Prepared(data, warnings)


def print_warnings(warnings: Sequence[str]) -> None:
    """Print each warning."""
    for warning in warnings:
        print(f"warning: {warning}", flush=True)


def describe_data(config: LearningConfig, source: TrainingSet, data: TrainingData) -> list[str]:
    """Return the description of a data set as lines of text.

    Args:
        config: Configuration in which `split.column` is not `auto` any more.
        source: The training set.
        data: The data that was prepared from the training set.
    """
    counts = [int(mask.sum()) for mask in (data.fit, data.validation, data.held_out)]
    split = describe_split(config.split, source.table)
    inputs = data.signature.inputs
    lines = [
        f"{source.table.num_rows} rows: {counts[0]} to fit on, {counts[1]} for early stopping, {counts[2]} held out "
        f"({split}){_describe_unused(data)}",
        f"{len(inputs)} inputs: {_first_names([_describe_input(spec) for spec in inputs])}",
        _describe_label(data),
    ]
    omitted = omitted_columns(config, source, data.signature.columns)
    if omitted:
        names = _first_names([f"{name} ({reason})" for name, reason in omitted.items()])
        lines.append(f"not among the inputs: {names}; `inputs=[…]` selects inputs by name")
    return lines


def omitted_columns(config: LearningConfig, source: TrainingSet, inputs: list[str]) -> dict[str, str]:
    """Return the unused columns, each with the reason: neither inputs, nor the label, nor in `exclude`.

    The result is empty if the configuration names the inputs.
    """
    if config.inputs is not None:
        return {}
    accounted_for = {*inputs, *config.exclude, config.label}
    return {
        field.name: _omission_reason(field, config, source)
        for field in source.table.schema
        if field.name not in accounted_for
    }


def _omission_reason(field: pa.Field, config: LearningConfig, source: TrainingSet) -> str:
    if field.name == config.split.column:
        return "the split uses it"
    if field.name in source.join_keys:
        return "join key"
    if field.name == "event_timestamp" or pa.types.is_temporal(field.type):
        return "time"
    if source.manifest:
        return "in no feature view"
    return "identifier, judging by its name"


def _describe_unused(data: TrainingData) -> str:
    count = int(data.unused.sum())
    return f"; {count} not used, because their outcome window is open" if count else ""


def _describe_input(spec: InputSpec) -> str:
    return spec.name if spec.categories is None else f"{spec.name} ({len(spec.categories)} categories)"


def _describe_label(data: TrainingData) -> str:
    signature = data.signature
    target = data.target
    if signature.task is Task.regression:
        return f"label {signature.label}: from {target.min():.4g} to {target.max():.4g}, mean {target.mean():.4g}"
    shares = np.bincount(target.astype(np.int64), minlength=len(signature.classes or ())) / len(target)
    classes = [f"{name} ({share:.1%})" for name, share in zip(signature.classes or (), shares, strict=True)]
    return f"label {signature.label}: {len(classes)} classes, {_first_names(classes)}"


def _first_names(names: list[str]) -> str:
    more = f", … {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
