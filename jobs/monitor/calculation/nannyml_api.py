"""Run the steps of NannyML chunk by chunk, and convert its results to figures.

If a step fails, its figure has a reason instead of a value, and the other figures are still computed.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jobs.monitor.calculation.frames import EPOCH, TIME, Frames
from jobs.monitor.calculation.measures import Figure, Measure, Measures

LOG = logging.getLogger("falaj.monitor")
CHUNK_PERIOD = "D"
"""NannyML's name for the length of a chunk: one artificial day."""
REFERENCE_FAILED = "the reference cannot be measured"
CHUNK_FAILED = "it cannot be measured"
NO_VALUE = "undefined: NannyML gives no value"
MIN_DEFINED = 3
"""Smallest number of reference chunks with a value that is enough for a threshold."""


def import_nannyml() -> Any:
    """Import NannyML with its usage reports turned off."""
    # Must be set before the import; otherwise NannyML reports its use over the network.
    os.environ["NML_DISABLE_USAGE_LOGGING"] = "1"
    import nannyml

    return nannyml


class StepResult(NamedTuple):
    """Result of a step that may fail."""

    result: Any
    fault: str
    """Reason why the step failed; empty if it succeeded."""


def try_step(step: Callable[[], Any], failure: str) -> StepResult:
    """Run a step of NannyML. If it fails, catch the error and return a fault.

    The ledger stores the fault. NannyML's message may quote a value of the data, so the message is only logged and is
    not part of the fault.

    Args:
        step: The step to run.
        failure: Text of the fault if the step fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the figures' reasons say the same as the warnings
            return StepResult(step(), "")
    except Exception as error:
        LOG.warning("%s", failure, exc_info=error)
        return StepResult(None, f"{failure} ({type(error).__name__}; see the job's output)")


def chunk_days(frames: Frames) -> Iterator[tuple[str, pd.Timestamp]]:
    """Yield each chunk with its artificial day, which is its value in the column `_time`."""
    for position, chunk in enumerate(frames.chunks):
        yield chunk, pd.Timestamp(EPOCH) + pd.Timedelta(days=position)


def rows_of(rows: pd.DataFrame, day: pd.Timestamp) -> pd.DataFrame:
    """Return the rows of one day, in their order, each with a time of its own.

    NannyML sorts rows by time. Its sort would shuffle rows with equal times, and a sum in another order can differ in
    the last bit.
    """
    of_day = rows[rows[TIME] == day]
    return of_day.assign(**{TIME: of_day[TIME] + pd.to_timedelta(np.arange(len(of_day)), unit="us")})


def measure_chunks(
    frames: Frames,
    name: str,
    measure_day: Callable[[Any], Any],
    *,
    skipped: dict[str, str] | None = None,
) -> Figure:
    """Measure a figure chunk by chunk, so that a chunk that fails does not affect the others.

    NannyML is fitted only once. Its values for single chunks are the same as for all chunks together.

    Args:
        frames: The frames with the chunks.
        name: NannyML's name for the figure.
        measure_day: Function that returns NannyML's result for the rows of one day.
        skipped: Chunks to skip, with the reason.
    """
    measures: Measures = {}
    reasons = dict(skipped or {})
    undefined: dict[str, str] = {}
    for chunk, day in chunk_days(frames):
        if chunk in reasons:
            continue
        attempt = try_step(functools.partial(measure_day, day), CHUNK_FAILED)
        if attempt.fault:
            reasons[chunk] = f"undefined: {attempt.fault}"
            continue
        figure = figure_from_result(attempt.result, name, [chunk], reasons={})
        measures |= figure.measures
        undefined |= figure.reasons
    return Figure(measures=measures, reasons=reasons | undefined)


def figure_from_result(
    result: Any, name: str | tuple[str, str], chunks: list[str], *, reasons: dict[str, str]
) -> Figure:
    """Convert NannyML's result to a figure. The result has one row for each chunk that is not in `reasons`."""
    # Sorted, because pandas warns about look-ups in NannyML's unsorted columns.
    table = result.filter(period="analysis").to_df().sort_index(axis="columns")[name]
    measured_chunks = [chunk for chunk in chunks if chunk not in reasons]
    reasons, measures = dict(reasons), {}
    no_threshold = threshold_fault(num_defined(result, name))
    for chunk, (_, row) in zip(measured_chunks, table.iterrows(), strict=True):
        measure = _measure_from_row(row)
        if measure is None:
            reasons[chunk] = NO_VALUE
            continue
        if no_threshold:
            reasons[chunk] = no_threshold
            measure = replace(measure, lower_threshold=None, upper_threshold=None, alert=False)
        measures[chunk] = measure
    return Figure(measures=measures, reasons=reasons)


def threshold_fault(defined: int) -> str:
    """Return why a figure has no threshold if this number of reference chunks has a value, or an empty text."""
    if defined >= MIN_DEFINED:
        return ""
    return f"no threshold: {defined} of the reference's chunks have a value"


def num_defined(result: Any, name: str | tuple[str, str]) -> int:
    """Return the number of reference chunks with a value."""
    table = result.filter(period="reference").to_df().sort_index(axis="columns")[name]
    column = next(name for name in ("realized", "value") if name in table.columns)
    return int(np.isfinite(table[column].to_numpy(dtype=float)).sum())


def _measure_from_row(row: Any) -> Measure | None:
    """Convert a row of NannyML's result to a measure, or None if it has no value."""
    value = finite_or_none(row.get("value"))
    if value is None:
        return None
    lower = finite_or_none(row.get("lower_confidence_boundary"))
    upper = finite_or_none(row.get("upper_confidence_boundary"))
    error = finite_or_none(row.get("sampling_error"))
    if error is not None and lower is None and upper is None:
        lower, upper = value - 3 * error, value + 3 * error
    return Measure(
        value=value,
        lower=lower,
        upper=upper,
        lower_threshold=finite_or_none(row.get("lower_threshold")),
        upper_threshold=finite_or_none(row.get("upper_threshold")),
        alert=bool(row["alert"]),
    )


def finite_or_none(value: Any) -> float | None:
    """Return a number as a float; None if it is missing, NaN or infinite."""
    return None if value is None or not np.isfinite(value) else float(value)
