"""From logged predictions, outcomes and the held-out reference to the two plain frames that the estimators take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import polars as pl

from cluster.errors import TrainingSetError, did_you_mean
from cluster.runtime import Model, ModelSignature, Task
from jobs.monitor.chunks import CHUNK, reference_chunks

TIME, TRUTH, PREDICTED, SCORE = "_time", "_truth", "_predicted", "_score"
PROBABILITY = "_probability_"
"""Prefix of a class's probability column in a multiclass frame."""
MISSING = "missing"
"""A null of a categorical input, so that more nulls than usual count as drift."""

_EPOCH = np.datetime64("2000-01-01", "D")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """What the estimators take.

    Both frames have `_truth` (null where no outcome is in), `_predicted`, the inputs, and `_score` for a binary task
    or `_probability_<class>` for a multiclass one. A binary `_truth` is 1 for the positive class. `_time` is an
    invented day per chunk: NannyML cuts by time, and its drift measures see no other column to cut by.
    """

    task: Task
    reference: pd.DataFrame
    served: pd.DataFrame
    chunks: list[str]
    """Names of the served chunks, in order; the first has the first day."""
    continuous: list[str]
    categorical: list[str]


def build(*, model: Model, reference: pl.DataFrame, served: pl.DataFrame, label: str) -> Frames:
    """The frames of one variant.

    Args:
        model: the very version that served.
        reference: rows it was not fitted on, in order of time, with its inputs and the label.
        served: its predictions in order of time, with `outcome` (null where unknown) and `_chunk`.
        label: column of the reference.

    Raises:
        TrainingSetError: the reference lacks the label.
        InvalidRequest: the reference lacks an input, or has it with another type.
    """
    signature = model.signature
    chunks = served[CHUNK].unique(maintain_order=True).to_list()
    served_rows = [served.filter(pl.col(CHUNK) == chunk).height for chunk in chunks]
    days = reference_chunks(reference.height, served_rows=served_rows)
    return Frames(
        task=signature.task,
        reference=_days(_reference(model, reference, label), days),
        served=_days(_served(signature, served), np.repeat(np.arange(len(chunks)), served_rows)),
        chunks=chunks,
        continuous=[name for name in _scalars(signature) if not _is_categorical(signature, name)],
        categorical=[name for name in _scalars(signature) if _is_categorical(signature, name)],
    )


def unknown_outcomes(signature: ModelSignature, outcomes: pl.Series) -> int:
    """Outcomes that are none of the model's classes, and so cannot be compared with any prediction."""
    given = outcomes.drop_nulls().to_list()
    return sum(value is None for value in _coded(signature, given))


def _reference(model: Model, rows: pl.DataFrame, label: str) -> pd.DataFrame:
    if label not in rows.columns:
        raise TrainingSetError(f"The reference has no column '{label}'.{did_you_mean(label, rows.columns)}")
    signature = model.signature
    predictions = model.predict(rows.to_arrow())
    frame = _inputs(signature, rows)
    frame[TRUTH] = _coded(signature, rows[label].to_list())
    match signature.task:
        case Task.binary:
            frame[SCORE] = predictions.scores
            frame[PREDICTED] = _coded(signature, predictions.labels())
        case Task.multiclass:
            frame[PREDICTED] = _coded(signature, predictions.labels())
            for position, name in enumerate(signature.classes or ()):
                frame[f"{PROBABILITY}{name}"] = predictions.scores[:, position]
        case Task.regression:
            frame[PREDICTED] = predictions.scores
    return frame


def _served(signature: ModelSignature, rows: pl.DataFrame) -> pd.DataFrame:
    frame = _inputs(signature, rows)
    frame[TRUTH] = _coded(signature, rows["outcome"].to_list())
    match signature.task:
        case Task.binary:
            frame[SCORE] = rows["probability"].to_numpy()
            frame[PREDICTED] = _coded(signature, rows["label"].to_list())
        case Task.multiclass:
            frame[PREDICTED] = _coded(signature, rows["label"].to_list())
            for name in signature.classes or ():
                frame[f"{PROBABILITY}{name}"] = rows["probabilities"].struct.field(str(name)).to_numpy()
        case Task.regression:
            frame[PREDICTED] = rows["value"].to_numpy()
    return frame


def _inputs(signature: ModelSignature, rows: pl.DataFrame) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    for name in _scalars(signature):
        if _is_categorical(signature, name):
            values = rows[name].to_list()
            columns[name] = np.array(
                [MISSING if value is None else str(value) for value in values], dtype=object
            )
        else:
            columns[name] = rows[name].cast(pl.Float64).to_numpy()
    return pd.DataFrame(columns)


def _coded(signature: ModelSignature, values: Sequence[Any]) -> list[Any]:
    code = _coder(signature)
    return [None if value is None else code(value) for value in values]


def _coder(signature: ModelSignature) -> Callable[[Any], Any]:
    # A class travels through JSON: 1, 1.0 and True are one key of a dict, and "1" is added to them.
    match signature.task, signature.classes:
        case Task.binary, (negative, positive):
            codes: dict[Any, Any] = {str(negative): 0, str(positive): 1, negative: 0, positive: 1}
        case Task.multiclass, tuple() as classes:
            codes = {key: str(name) for name in classes for key in (str(name), name)}
        case _:
            return float
    return lambda value: codes.get(value, codes.get(str(value)))


def _scalars(signature: ModelSignature) -> list[str]:
    """The inputs that are one value each; the distance of lists is not measured."""
    return [spec.name for spec in signature.inputs if spec.length is None]


def _is_categorical(signature: ModelSignature, name: str) -> bool:
    spec = next(spec for spec in signature.inputs if spec.name == name)
    return spec.categories is not None or spec.dtype == "bool"


def _days(frame: pd.DataFrame, days: Any) -> pd.DataFrame:
    return frame.assign(**{TIME: pd.to_datetime(_EPOCH + days.astype("timedelta64[D]"))})
