"""From logged predictions, outcomes and the held-out reference to the two plain frames that the estimators take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
from polars.exceptions import PolarsError

from cluster.errors import InvalidRequest, TrainingSetError, did_you_mean
from cluster.records.reading import TAKEN
from cluster.runtime import InputSpec, Model, ModelSignature, Task, Truths
from jobs.monitor.chunks import CHUNK, reference_chunks

TIME, TRUTH, PREDICTED, SCORE = "_time", "_truth", "_predicted", "_score"
PROBABILITY = "_probability_"
"""Prefix of a class's probability column in a multiclass frame."""
MISSING = "(null)"
"""A null of a categorical input, so that more nulls than usual count as drift."""

_EPOCH = np.datetime64("2000-01-01", "D")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """What the estimators take.

    Both frames have `_truth` (null where no outcome is in), `_predicted`, the inputs that could be read, and `_score`
    for a binary task or `_probability_<class>` for a multiclass one. A binary `_truth` is 1 for the positive class.
    `_time` is an invented day per chunk: NannyML cuts by time, and its drift measures see no other column to cut by.
    """

    task: Task
    reference: pd.DataFrame
    served: pd.DataFrame
    chunks: list[str]
    """Names of the served chunks, in order; the first has the first day."""
    continuous: list[str]
    categorical: list[str]
    known: dict[str, frozenset[str]] = field(default_factory=dict)
    """Categorical input to the values that the model knows, as the frames write them."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Input to why it cannot be measured; it is in neither list above."""
    reference_fault: str = ""
    """Why the model has no scores for the reference; `_predicted` and the scores are not in it then."""


def build(*, model: Model, reference: pl.DataFrame, served: pl.DataFrame, label: str) -> Frames:
    """The frames of one variant.

    Args:
        model: the very version that served.
        reference: rows it was not fitted on, in order of time, with its inputs and the label.
        served: its predictions in order of time and in the signature's types, with `outcome` (null where unknown) and
            `_chunk`.
        label: column of the reference.

    Raises:
        TrainingSetError: the reference lacks the label.
    """
    signature = model.signature
    if label not in reference.columns:
        raise TrainingSetError(
            f"The reference has no column '{label}'.{did_you_mean(label, reference.columns)}"
        )
    chunks = served[CHUNK].unique(maintain_order=True).to_list()
    served_rows = [served.filter(pl.col(CHUNK) == chunk).height for chunk in chunks]
    days = reference_chunks(reference.height, served_rows=served_rows)
    columns = {name: _inputs(signature, rows) for name, rows in (("reference", reference), ("log", served))}
    unusable = {
        name: f"{reason} in the {where}"
        for where, (_, reasons) in columns.items()
        for name, reason in reasons.items()
    }
    before, fault = _reference(model, reference, label, columns["reference"][0])
    after = _served(signature, served, columns["log"][0])
    # The distance of lists is not measured.
    usable = [spec for spec in signature.inputs if spec.name not in unusable and spec.length is None]
    return Frames(
        task=signature.task,
        reference=_days(before, days),
        served=_days(after, np.repeat(np.arange(len(chunks)), served_rows)),
        chunks=chunks,
        continuous=[spec.name for spec in usable if not _is_categorical(spec)],
        categorical=[spec.name for spec in usable if _is_categorical(spec)],
        known={spec.name: frozenset(map(str, spec.categories)) for spec in usable if spec.categories},
        unusable=unusable,
        reference_fault=fault,
    )


def _reference(
    model: Model, rows: pl.DataFrame, label: str, inputs: pd.DataFrame
) -> tuple[pd.DataFrame, str]:
    """The frame, and why it has no scores, if it has none."""
    signature = model.signature
    frame = inputs.assign(**{TRUTH: _coded(signature, rows[label].to_list())})
    try:
        predictions = model.predict(rows.to_arrow())
    except InvalidRequest as error:  # it names a column and a type, and no value
        return frame, f"the model cannot read the reference: {error}"
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
    return frame, ""


def _served(signature: ModelSignature, rows: pl.DataFrame, inputs: pd.DataFrame) -> pd.DataFrame:
    frame = inputs.assign(**{TRUTH: _coded(signature, rows["outcome"].to_list())})
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


def _inputs(signature: ModelSignature, rows: pl.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """The inputs that can be read, and why others cannot."""
    columns: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for spec in signature.inputs:
        if spec.length is not None:
            continue
        if spec.name in TAKEN:
            reasons[spec.name] = "hidden by a column of the same name"
        elif spec.name not in rows.columns:
            reasons[spec.name] = "absent"
        elif _is_categorical(spec):
            values = rows[spec.name].to_list()
            texts = [MISSING if value is None else str(value) for value in values]
            columns[spec.name] = np.array(texts, dtype=object)
        else:
            try:
                columns[spec.name] = rows[spec.name].cast(pl.Float64).to_numpy()
            except PolarsError:
                reasons[spec.name] = f"no numbers but {rows[spec.name].dtype}"
    return pd.DataFrame(columns, index=pd.RangeIndex(rows.height)), reasons


def _coded(signature: ModelSignature, values: Sequence[Any]) -> list[Any]:
    """A class's position for a binary task, its name for a multiclass one, or the number; None where it is none."""
    code = _coder(signature)
    return [None if value is None else code(value) for value in values]


def _coder(signature: ModelSignature) -> Callable[[Any], Any]:
    truths = Truths(signature)
    match signature.task, signature.classes:
        case Task.binary, (negative, positive):
            codes: dict[Any, Any] = {negative: 0, positive: 1}
        case Task.multiclass, tuple() as classes:
            codes = {name: str(name) for name in classes}
        case _:
            return truths.of
    return lambda value: codes.get(truths.of(value))


def _is_categorical(spec: InputSpec) -> bool:
    return spec.categories is not None or spec.dtype == "bool"


def _days(frame: pd.DataFrame, days: Any) -> pd.DataFrame:
    return frame.assign(**{TIME: pd.to_datetime(_EPOCH + days.astype("timedelta64[D]"))})
