"""Build the two pandas frames for NannyML: the held-out reference, and the served rows with outcomes.

NannyML is fitted to the reference once. So the reference's frame is built without served rows, and served rows are
added chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import polars as pl
from polars.exceptions import PolarsError

from cluster.errors import InvalidRequest, TrainingSetError, did_you_mean
from cluster.records.reading import RESERVED_COLUMNS
from cluster.runtime import InputSpec, Model, ModelSignature, OutcomeParser, Task
from jobs.monitor.chunks import CHUNK, reference_chunks

TIME, TRUTH, PREDICTED, SCORE = "_time", "_truth", "_predicted", "_score"
PROBABILITY = "_probability_"
"""In a multiclass frame, the name of a class's probability column is this prefix and the class."""
MISSING = "(null)"
"""Category that replaces the nulls of a categorical input. So an unusual number of nulls shows as drift."""
EPOCH = np.datetime64("2000-01-01", "D")
"""`_time` of the first chunk; each later chunk is one day later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """Input of the NannyML estimators.

    Both frames have `_truth` (null if the outcome is unknown), `_predicted`, the inputs that could be read, and
    `_score` for a binary task or `_probability_<class>` for a multiclass task. A binary `_truth` is 1 for the positive
    class. `_time` is an artificial day, a different one for each chunk, because NannyML can only cut rows by time.
    """

    task: Task
    reference: pd.DataFrame
    served: pd.DataFrame
    chunks: list[str]
    """Names of the served chunks in order; the first chunk has the first day."""
    continuous: list[str]
    """Numeric inputs."""
    categorical: list[str]
    """Categorical inputs."""
    known: dict[str, frozenset[str]] = field(default_factory=dict)
    """For each categorical input, the values that the model knows, as text."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Inputs that cannot be measured, each with the reason. They are neither in `continuous` nor in `categorical`."""
    reference_fault: str = ""
    """Reason why the model cannot score the reference. If set, the reference has no `_predicted` and no scores."""


class _Inputs(NamedTuple):
    """The inputs of some rows."""

    columns: pd.DataFrame
    """Inputs that could be read."""
    unusable: dict[str, str]
    """Inputs that could not be read, each with the reason."""


def build_frames(*, model: Model, reference: pl.DataFrame, served: pl.DataFrame, label: str) -> Frames:
    """Build the frames of one version under one variant. For arguments and errors see the two functions it calls."""
    frames = reference_frames(
        model=model,
        reference=reference,
        served_rows=served[CHUNK].value_counts()["count"].to_list(),
        label=label,
    )
    return with_served(frames, model.signature, served)


def reference_frames(
    *, model: Model, reference: pl.DataFrame, served_rows: Sequence[int], label: str
) -> Frames:
    """Return frames without served rows.

    Args:
        model: The version that served.
        reference: Rows that the version was not fitted on, in order of time. They have the version's inputs and the
            label.
        served_rows: Numbers of rows of the served chunks. The reference is cut into chunks of a similar size.
        label: Label column of the reference.

    Raises:
        TrainingSetError: The reference does not have the label.
    """
    signature = model.signature
    if label not in reference.columns:
        raise TrainingSetError(
            f"The reference has no column '{label}'.{did_you_mean(label, reference.columns)}"
        )
    inputs = _read_inputs(signature, reference)
    frame, fault = _reference_frame(model, reference, label, inputs.columns)
    # Drift of lists is not measured.
    usable = [spec for spec in signature.inputs if spec.name not in inputs.unusable and spec.length is None]
    return Frames(
        task=signature.task,
        reference=_with_days(frame, reference_chunks(reference.height, served_rows=served_rows)),
        served=_with_days(frame.head(0), np.arange(0)),
        chunks=[],
        continuous=[spec.name for spec in usable if not _is_categorical(spec)],
        categorical=[spec.name for spec in usable if _is_categorical(spec)],
        known={spec.name: frozenset(map(str, spec.categories)) for spec in usable if spec.categories},
        unusable={name: f"{reason} in the reference" for name, reason in inputs.unusable.items()},
        reference_fault=fault,
    )


def with_served(frames: Frames, signature: ModelSignature, served: pl.DataFrame) -> Frames:
    """Return the frames with other served rows.

    Args:
        frames: Frames with the reference.
        signature: Signature of the version that served.
        served: Served rows in order of time, in the types of the signature. They also have the columns `outcome` (null
            if unknown) and `_chunk`.
    """
    chunks = served[CHUNK].unique(maintain_order=True).to_list()
    served_rows = [served.filter(pl.col(CHUNK) == chunk).height for chunk in chunks]
    inputs = _read_inputs(signature, served)
    unusable = {name: f"{reason} in the log" for name, reason in inputs.unusable.items()}
    return replace(
        frames,
        served=_with_days(
            _served_frame(signature, served, inputs.columns), np.repeat(np.arange(len(chunks)), served_rows)
        ),
        chunks=chunks,
        continuous=[name for name in frames.continuous if name not in unusable],
        categorical=[name for name in frames.categorical if name not in unusable],
        known={name: values for name, values in frames.known.items() if name not in unusable},
        unusable=unusable | frames.unusable,
    )


def _reference_frame(
    model: Model, rows: pl.DataFrame, label: str, inputs: pd.DataFrame
) -> tuple[pd.DataFrame, str]:
    """Return the reference rows with truths and scores, and why there are no scores (empty if there are scores)."""
    signature = model.signature
    frame = inputs.assign(**{TRUTH: _encode_truths(signature, rows[label].to_list())})
    try:
        predictions = model.predict(rows.to_arrow())
    except InvalidRequest as error:  # the message names a column and a type, but no value
        return frame, f"the model cannot read the reference: {error}"
    match signature.task:
        case Task.binary:
            frame[SCORE] = predictions.scores
            frame[PREDICTED] = _encode_truths(signature, predictions.labels())
        case Task.multiclass:
            frame[PREDICTED] = _encode_truths(signature, predictions.labels())
            for position, name in enumerate(signature.classes or ()):
                frame[f"{PROBABILITY}{name}"] = predictions.scores[:, position]
        case Task.regression:
            frame[PREDICTED] = predictions.scores
    return frame, ""


def _served_frame(signature: ModelSignature, rows: pl.DataFrame, inputs: pd.DataFrame) -> pd.DataFrame:
    frame = inputs.assign(**{TRUTH: _encode_truths(signature, rows["outcome"].to_list())})
    match signature.task:
        case Task.binary:
            frame[SCORE] = rows["probability"].to_numpy()
            frame[PREDICTED] = _encode_truths(signature, rows["label"].to_list())
        case Task.multiclass:
            frame[PREDICTED] = _encode_truths(signature, rows["label"].to_list())
            for name in signature.classes or ():
                frame[f"{PROBABILITY}{name}"] = rows["probabilities"].struct.field(str(name)).to_numpy()
        case Task.regression:
            frame[PREDICTED] = rows["value"].to_numpy()
    return frame


def _read_inputs(signature: ModelSignature, rows: pl.DataFrame) -> _Inputs:
    """Convert the inputs to columns of numbers or text. Inputs that are lists are left out."""
    columns: dict[str, Any] = {}
    unusable: dict[str, str] = {}
    for spec in signature.inputs:
        if spec.length is not None:
            continue
        if spec.name in RESERVED_COLUMNS:
            unusable[spec.name] = "hidden by a column of the same name"
        elif spec.name not in rows.columns:
            unusable[spec.name] = "absent"
        elif _is_categorical(spec):
            values = rows[spec.name].to_list()
            texts = [MISSING if value is None else str(value) for value in values]
            columns[spec.name] = np.array(texts, dtype=object)
        else:
            try:
                columns[spec.name] = rows[spec.name].cast(pl.Float64).to_numpy()
            except PolarsError:
                unusable[spec.name] = f"not numbers but {rows[spec.name].dtype}"
    return _Inputs(pd.DataFrame(columns, index=pd.RangeIndex(rows.height)), unusable)


def _encode_truths(signature: ModelSignature, values: Sequence[Any]) -> list[Any]:
    """Encode labels or outcomes. A binary task gives 0 or 1, a multiclass task the class name, a regression the number.

    A value that is null or does not fit the task becomes None.
    """
    encode = _truth_encoder(signature)
    return [None if value is None else encode(value) for value in values]


def _truth_encoder(signature: ModelSignature) -> Callable[[Any], Any]:
    truths = OutcomeParser(signature)
    match signature.task, signature.classes:
        case Task.binary, (negative, positive):
            codes: dict[Any, Any] = {negative: 0, positive: 1}
        case Task.multiclass, tuple() as classes:
            codes = {name: str(name) for name in classes}
        case _:
            return truths.parse
    return lambda value: codes.get(truths.parse(value))


def _is_categorical(spec: InputSpec) -> bool:
    return spec.categories is not None or spec.dtype == "bool"


def _with_days(frame: pd.DataFrame, days: Any) -> pd.DataFrame:
    """Add the column `_time`. `days` contains the chunk number of each row."""
    return frame.assign(**{TIME: pd.to_datetime(EPOCH + days.astype("timedelta64[D]"))})
