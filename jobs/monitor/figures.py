"""Compute all figures of one served version.

NannyML runs in a Ray task. So the Ray dashboard shows the work, and the task reserves CPUs of the cluster.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import polars as pl
import ray

from cluster.placement import find_nodes, options
from cluster.registry import ModelVersion
from cluster.runtime import Task, load_model
from cluster.security.keys.access import KeyAccess, key_store
from jobs.monitor.chunks import CHUNK, assign_chunks
from jobs.monitor.config import MonitorConfig
from jobs.monitor.drift import measure_drift
from jobs.monitor.frames import Frames, build_frames
from jobs.monitor.logged import ServedVersion
from jobs.monitor.measures import Measure, Measures
from jobs.monitor.performance import METRIC_NAMES, estimate_performance, realised_performance
from jobs.monitor.shares import missing_shares, unseen_shares

Figures = dict[str, Any]
"""JSON content of a version's result file."""


def measure_version(
    config: MonitorConfig, served: ServedVersion, reference: pl.DataFrame, *, access: KeyAccess
) -> Figures:
    """Return all figures of one version by chunk. For each undefined figure, the entry `undefined` has the reason."""
    metric = METRIC_NAMES[Task(served.version.task)]
    rows = served.rows
    summary = {
        "variant": served.variant,
        "version": served.version.version,
        "metric": metric,
        "rows": rows.height,
        "outcomes": 0 if rows.is_empty() else _num_outcomes(rows),
    }
    figures: Figures = {"periods": {}, "drift": {}, "missing": {}, "unseen": {}, "undefined": {}}
    if rows.is_empty():
        return summary | {"status": "no row has a score: nothing to measure"} | figures
    all_chunks = assign_chunks(rows, config.period, min_rows=1)
    large_chunks = all_chunks.filter(pl.len().over(CHUNK) >= config.min_rows)
    if large_chunks.is_empty():
        status = f"no chunk has {config.min_rows} rows: nothing to measure"
    else:
        task = _measure.options(**options(find_nodes(config.placement))).remote(
            served.version, access, reference, large_chunks, config.label, config.min_rows
        )
        figures, status = ray.get(task), "measured"
    figures = add_small_chunks(figures, all_chunks, metric=metric, min_rows=config.min_rows)
    return summary | {"status": status} | figures


def add_small_chunks(figures: Figures, all_chunks: pl.DataFrame, *, metric: str, min_rows: int) -> Figures:
    """Add the chunks with fewer than `min_rows` rows to the figures. The reason says how many rows a chunk has.

    Args:
        figures: Figures of the chunks with enough rows.
        all_chunks: Served rows of all chunks.
        metric: Name of the performance metric.
        min_rows: A chunk with fewer rows has no figures.
    """
    periods = dict[str, Any]()
    undefined = {name: dict(by_chunk) for name, by_chunk in figures["undefined"].items()}
    for (chunk,), rows in all_chunks.group_by(CHUNK, maintain_order=True):
        name = str(chunk)
        periods[name] = figures["periods"].get(name) or _period(metric, rows, None, None)
        if rows.height < min_rows:
            for figure in (f"estimated_{metric}", f"realised_{metric}", "drift"):
                undefined.setdefault(figure, {})[name] = f"chunk below min_rows: {rows.height} of {min_rows}"
    return figures | {"periods": periods, "undefined": undefined}


def compute_figures(frames: Frames, served: pl.DataFrame, *, min_outcomes: int) -> Figures:
    """Compute every figure of one version for each chunk of `served`."""
    estimates, realised = (
        estimate_performance(frames),
        realised_performance(frames, min_outcomes=min_outcomes),
    )
    drift, metric = measure_drift(frames), METRIC_NAMES[frames.task]
    periods = {
        chunk: _period(
            metric,
            served.filter(pl.col(CHUNK) == chunk),
            estimates.measures.get(chunk),
            realised.measures.get(chunk),
        )
        for chunk in frames.chunks
    }
    undefined = {f"estimated_{metric}": estimates.reasons, f"realised_{metric}": realised.reasons}
    undefined |= {f"drift of {name}": figure.reasons for name, figure in drift.items()}
    return {
        "periods": periods,
        "drift": {name: _to_json_values(figure.measures) for name, figure in drift.items()},
        "missing": {name: _to_json_values(measures) for name, measures in missing_shares(frames).items()},
        "unseen": {name: _to_json_values(measures) for name, measures in unseen_shares(frames).items()},
        "undefined": {name: by_chunk for name, by_chunk in undefined.items() if by_chunk},
    }


@ray.remote
def _measure(
    version: ModelVersion,
    access: KeyAccess,
    reference: pl.DataFrame,
    served: pl.DataFrame,
    label: str | None,
    min_outcomes: int,
) -> Figures:
    model = load_model(version, key_store(access))
    frames = build_frames(
        model=model, reference=reference, served=served, label=label or model.signature.label
    )
    return compute_figures(frames, served, min_outcomes=min_outcomes)


def _period(
    metric: str, rows: pl.DataFrame, estimate: Measure | None, realisation: Measure | None
) -> dict[str, Any]:
    return {
        f"estimated_{metric}": None if estimate is None else estimate.value,
        f"realised_{metric}": None if realisation is None else realisation.value,
        "rows": rows.height,
        "outcomes": _num_outcomes(rows),
        "estimate": None if estimate is None else asdict(estimate),
        "realisation": None if realisation is None else asdict(realisation),
    }


def _num_outcomes(rows: pl.DataFrame) -> int:
    return int(rows["outcome"].is_not_null().sum())


def _to_json_values(measures: Measures) -> dict[str, Any]:
    return {chunk: asdict(measure) for chunk, measure in measures.items()}
