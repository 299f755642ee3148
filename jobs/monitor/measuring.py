"""Measure chunks in Ray tasks. So the Ray dashboard shows the work, and it reserves CPUs of the cluster.

Each task has a few chunks, so its memory depends on the size of a chunk and not on the size of the log. A task reads
the columns that it needs of the records of its chunks. Nothing of the log is copied to a disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import ray

from cluster.errors import AccessDenied
from cluster.records.columns import LINE, SEGMENT
from cluster.records.reading import INVALID_OUTCOME
from cluster.records.schema import SHADOW
from cluster.records.table import LogFile
from cluster.registry import ModelVersion
from cluster.runtime import ModelSignature, OutcomeParser, load_model
from cluster.runtime.loader import load_signature
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.keys.store import KeyNotFound, KeyRevoked
from jobs.monitor.calculation.combining import ChunkResult, Figures, small_chunk
from jobs.monitor.calculation.figures import compute_figures
from jobs.monitor.calculation.fit import Fit, fit_reference, open_fit, seal_fit
from jobs.monitor.calculation.frames import reference_frames, with_served
from jobs.monitor.calculation.measures import METRIC_NAMES
from jobs.monitor.calculation.nannyml_api import import_nannyml
from jobs.monitor.chunks import CHUNK
from jobs.monitor.config import Period
from jobs.monitor.log import decode, matching
from jobs.monitor.log.counts import ChunkContent, LogCounts, chunk_of_day
from jobs.monitor.log.index import day_of, normalise
from jobs.monitor.log.tasks import max_tasks
from jobs.monitor.log.units import Index, OpenLog, known_lines, read_units
from jobs.monitor.stored_fits import FitName

TASK_ROWS = 150_000
"""A task gets chunks until they have this many rows. A larger chunk has a task of its own."""
_POSITION = (SEGMENT, LINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogPart:
    """The part of a log that a task reads."""

    root: str
    files: tuple[LogFile, ...]
    segments: tuple[pa.Table, ...]
    """Records of segments, which this process has read."""
    lines: dict[str, int]
    """Number of counted lines by segment. Later lines are not read."""

    def tables(self, access: KeyAccess, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the records of one file or segment after the other."""
        names = (*_POSITION, *columns)
        yield from (table for _, table in read_units(self.root, self.files, access, names))
        yield from (table.select(names) for table in self.segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkWork:
    """The chunks of one task."""

    version: ModelVersion
    variant: str
    period: Period
    chunks: tuple[str, ...]
    min_rows: int
    access: KeyAccess
    predictions: LogPart
    outcomes: LogPart


def plan_work(
    counts: LogCounts,
    chunks: Mapping[str, ChunkContent],
    *,
    version: ModelVersion,
    variant: str,
    period: Period,
    min_rows: int,
    access: KeyAccess,
) -> Iterator[ChunkWork]:
    """Yield the work of each task: chunks in order, until they have `TASK_ROWS` rows.

    Args:
        counts: The index of the logs.
        chunks: The chunks to measure, with their content.
        version, variant, period, min_rows, access: See `ChunkWork`.
    """
    for names in _batches(chunks):
        contents = [chunks[name] for name in names]
        yield ChunkWork(
            version=version,
            variant=variant,
            period=period,
            chunks=names,
            min_rows=min_rows,
            access=access,
            predictions=_part(
                counts.predictions,
                counts.prediction_index,
                {segment for one in contents for segment in one.records},
                decode.COLUMNS,
            ),
            outcomes=_part(
                counts.outcomes,
                counts.outcome_index,
                {segment for one in contents for segment in one.outcomes},
                matching.COLUMNS,
            ),
        )


def _batches(chunks: Mapping[str, ChunkContent]) -> Iterator[tuple[str, ...]]:
    names: list[str] = []
    rows = 0
    for name, content in chunks.items():
        if names and rows + content.answered > TASK_ROWS:
            yield tuple(names)
            names, rows = [], 0
        names.append(name)
        rows += content.answered
    if names:
        yield tuple(names)


def _part(log: OpenLog, index: Index, segments: set[str], columns: Sequence[str]) -> LogPart:
    lines: dict[str, int] = {}
    files, tables = [], []
    for unit in log.units:
        wanted = index[unit.name].segments.keys() & segments
        for segment in wanted:
            lines[segment] = max(lines.get(segment, 0), index[unit.name].segments[segment].lines)
        if wanted and unit.file is not None:
            files.append(unit.file)
        elif wanted:
            tables.append(log.read_segment(unit.name, (*_POSITION, *columns)))
    return LogPart(root=log.location.root, files=tuple(files), segments=tuple(tables), lines=lines)


def measure_work(work: ChunkWork, fit: Fit | None) -> dict[str, ChunkResult]:
    """Read the records of some chunks, and measure the chunks.

    Args:
        work: The chunks.
        fit: What was fitted to the reference; None if no chunk has `min_rows` rows.
    """
    signature = load_signature(work.version, key_store(work.access))
    answers, odd_inputs = _read_answers(work, signature)
    outcomes = _read_outcomes(work, answers)
    results = {}
    for chunk in work.chunks:
        if chunk not in answers:
            continue
        matched = matching.match(answers.pop(chunk), outcomes, OutcomeParser(signature))
        rows = matched.rows.with_columns(pl.lit(chunk).alias(CHUNK))
        results[chunk] = ChunkResult(
            figures=measure_chunk(rows, chunk, signature, fit, min_rows=work.min_rows),
            odd_outcomes=int(rows[INVALID_OUTCOME].sum()),
            unknown_rows=matched.unknown_rows,
            odd_inputs=odd_inputs.get(chunk, {}),
        )
    return results


measure_log_chunks = ray.remote(measure_work)


def few_at_a_time(tasks: Iterator[Any]) -> Iterator[Any]:
    """Start tasks and yield their results. At most `max_tasks` run at the same time."""
    limit = max_tasks()
    running: list[Any] = []
    for task in tasks:
        running.append(task)
        if len(running) >= limit:
            done, running = ray.wait(running)
            yield from ray.get(done)
    while running:
        done, running = ray.wait(running)
        yield from ray.get(done)


def prepare_workers(where: dict[str, Any]) -> None:
    """Let the other workers import NannyML, which takes seconds, while one of them fits."""
    for _ in range(max_tasks() - 1):
        prepare.options(**where).remote()


@ray.remote
def measure_rows(
    version: ModelVersion, access: KeyAccess, rows: pl.DataFrame, fit: Fit | None, min_rows: int
) -> Figures:
    """Measure one chunk whose rows are in memory. `rows` has the columns of a served version, and `_chunk`."""
    signature = load_signature(version, key_store(access))
    return measure_chunk(rows, str(rows[CHUNK][0]), signature, fit, min_rows=min_rows)


def measure_chunk(
    rows: pl.DataFrame, chunk: str, signature: ModelSignature, fit: Fit | None, *, min_rows: int
) -> Figures:
    """Return the figures of one chunk."""
    if rows.height < min_rows or fit is None:
        return small_chunk(chunk, rows, metric=METRIC_NAMES[signature.task], min_rows=min_rows)
    return compute_figures(with_served(fit.frames, signature, rows), rows, fit, min_outcomes=min_rows)


@ray.remote(num_returns=2)
def fit_version(
    version: ModelVersion,
    access: KeyAccess,
    reference: pl.DataFrame,
    label: str | None,
    served_rows: int,
    name: FitName,
) -> tuple[Fit, bytes]:
    """Fit NannyML to a version's reference. Return the fit and its encrypted form, which is empty without permission.

    Args:
        version: The version.
        access: Access to the model's key.
        reference: Rows that the version was not fitted on, in order of time.
        label: Label column of the reference; None is the version's own.
        served_rows: Usual number of rows of a served chunk.
        name: Name of the fit.
    """
    store = key_store(access)
    model = load_model(version, store)
    frames = reference_frames(
        model=model, reference=reference, served_rows=[served_rows], label=label or model.signature.label
    )
    fit = fit_reference(frames)
    try:
        return fit, seal_fit(fit, name, store)
    except (AccessDenied, KeyNotFound, KeyRevoked):
        return fit, b""


@ray.remote
def prepare() -> None:
    """Import NannyML in this worker."""
    import_nannyml()


@ray.remote
def read_fit(data: bytes, name: FitName, access: KeyAccess) -> Fit:
    """Decrypt a stored fit, see `open_fit`."""
    return open_fit(data, name, key_store(access))


def _read_answers(
    work: ChunkWork, signature: ModelSignature
) -> tuple[dict[str, pl.DataFrame], dict[str, dict[str, int]]]:
    """Return the answered rows by chunk, in order of time, and the numbers of odd values by chunk and input."""
    parts: list[pl.DataFrame] = []
    odd: dict[str, dict[str, int]] = {}
    for table in work.predictions.tables(work.access, decode.COLUMNS):
        chunks = _chunks_of(table, work)
        records = table.filter(chunks.is_not_null().to_arrow())
        answers = decode.decode(records, signature)
        if answers.odd_inputs:
            for chunk in work.chunks:
                of_chunk = decode.decode(
                    table.filter((chunks == chunk).fill_null(False).to_arrow()), signature
                )
                for name, count in of_chunk.odd_inputs.items():
                    counts = odd.setdefault(chunk, {})
                    counts[name] = counts.get(name, 0) + count
        parts.append(answers.rows)
    filled = [part for part in parts if part.height]
    if not filled:
        return {}, odd
    rows = pl.concat(filled, how="diagonal_relaxed").with_columns(
        _chunk_expression("as_of", work.period).alias(CHUNK)
    )
    rows = rows.sort("as_of", "prediction_id", "row")
    by_chunk = rows.partition_by(CHUNK, as_dict=True, include_key=False, maintain_order=True)
    return {str(chunk): part for (chunk,), part in by_chunk.items()}, odd


def _chunks_of(table: pa.Table, work: ChunkWork) -> pl.Series:
    """Return the chunk of each record; null for a record that belongs to none of the task's chunks."""
    names = [*_POSITION, "as_of", "version", "variant", "arm", "other"]
    rows = normalise(pl.DataFrame(pl.from_arrow(table.select(names)))).with_row_index("_number")
    ours = known_lines(rows, work.predictions.lines).filter(
        (pl.col("version") == work.version.version)
        & (pl.col("variant").fill_null("None") == work.variant)
        & pl.col("arm").ne_missing(SHADOW)
    )
    ours = ours.with_columns(_chunk_expression("as_of", work.period).alias(CHUNK)).filter(
        pl.col(CHUNK).is_in(list(work.chunks))
    )
    return rows.join(ours.select("_number", CHUNK), on="_number", how="left", maintain_order="left")[CHUNK]


def _chunk_expression(column: str, period: Period) -> pl.Expr:
    return day_of(column).str.head(len(chunk_of_day("0000-00-00", period)))


def _read_outcomes(work: ChunkWork, answers: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Return the outcomes of the answers, in the order in which they were written."""
    ids = pl.concat([part["prediction_id"] for part in answers.values()]).unique() if answers else None
    parts = [
        known_lines(pl.DataFrame(pl.from_arrow(table)), work.outcomes.lines).filter(
            pl.col("prediction_id").is_in(ids.implode())
        )
        for table in work.outcomes.tables(work.access, matching.COLUMNS)
        if ids is not None
    ]
    if not parts:
        types: Iterable[Any] = (pl.String, pl.Int64, pl.String, pl.Datetime("us", "UTC"))
        return pl.DataFrame(schema=dict(zip(matching.COLUMNS, types, strict=True)))
    return pl.concat(parts).sort(_POSITION)
