"""One monitoring run: find the chunks that have changed, measure them, and combine their figures with the kept ones.

A run that finds no change needs neither Ray nor pandas. So both are imported, and the process is attached to Ray, only
when something must be computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.placement import find_nodes, options
from cluster.records.location import outcome_log, prediction_log
from cluster.records.progress import LogAge, log_age
from cluster.registry import ModelVersion, Registry
from cluster.runtime import Task
from cluster.security.acting import Actor
from cluster.security.keys.access import key_store
from cluster.storage import Layout, file_name, write_bytes
from jobs.monitor.calculation.combining import ChunkResult, Figures, combine
from jobs.monitor.calculation.measures import METRIC_NAMES
from jobs.monitor.chunks import CHUNK, assign_chunks
from jobs.monitor.config import MonitorConfig
from jobs.monitor.kept import KeptFiles
from jobs.monitor.log.counts import ChunkContent, LogCounts, count_logs, run_options
from jobs.monitor.logged import ScoredLog, ServedVersion
from jobs.monitor.reference import References, reference_rows
from jobs.monitor.stored_fits import FitName, fit_name, stored_fit, typical_rows

MAX_VARIANT_CHARS = 100
"""Largest number of characters of a variant's name in a file name; a longer name is cut and gets a hash."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one version under one variant."""

    served: ServedVersion
    figures: Figures
    reference_hash: str
    predictions_hash: str
    """SHA-256 of what identifies the measured rows."""
    fits: dict[str, str]
    """SHA-256 of the stored fit by its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorRun:
    """What all versions of one monitoring run have in common."""

    config: MonitorConfig
    places: Layout
    ledger: Ledger
    actor: Actor
    references: References
    attach: Callable[[], object]
    """Attaches this process to Ray."""

    def measuring(self) -> Any:
        """Attach to Ray, and return the module with the tasks."""
        self.attach()
        from jobs.monitor import measuring  # imports Ray and pandas

        return measuring

    @property
    def _folder(self) -> str:
        return self.places.monitor(self.config.name)

    def _kept(self) -> KeptFiles:
        return KeptFiles(folder=self._folder, model=self.config.name, store=key_store(self.actor.access))

    def log_ages(self) -> tuple[LogAge, LogAge]:
        """Return how complete both logs are. Call it before the logs are read."""
        return (
            log_age(prediction_log(self.places, self.ledger, self.config.name)),
            log_age(outcome_log(self.places, self.ledger, self.config.name)),
        )

    def count(self) -> LogCounts:
        """Bring the index of the model's logs up to date.

        Raises:
            RefusedError: The model has no logged prediction.
        """
        config, access = self.config, self.actor.access
        counts = count_logs(
            prediction_log(self.places, self.ledger, config.name),
            outcome_log(self.places, self.ledger, config.name),
            access,
            self._kept(),
            config.placement,
            self.attach,
        )
        if not counts.chunks(config.period):
            raise RefusedError(f"No prediction of '{config.name}' is logged, so there is nothing to monitor.")
        return counts

    def measure_log(self, counts: LogCounts) -> Iterator[Measured]:
        """Measure each version under each of its variants."""
        registry = Registry(self.ledger, self.places)
        for (variant, number), chunks in counts.chunks(self.config.period).items():
            served = ServedVersion(
                variant=variant,
                version=registry.get(self.config.name, number),
                failed=counts.failed(variant, number),
            )
            answered = {name: content for name, content in chunks.items() if content.answered}
            yield _VersionRun(run=self, counts=counts, served=served, chunks=answered).measure()

    def measure_scores(self, log: ScoredLog) -> Measured:
        """Measure a run of batch scoring. Its rows are in memory, and nothing is kept."""
        served, config = log.served, self.config
        path, _ = self.references.path_of(served.version)
        rows = (
            pl.DataFrame()
            if served.rows.is_empty()
            else assign_chunks(served.rows, config.period, min_rows=1)
        )
        chunks = {} if rows.is_empty() else {
            str(chunk): part
            for (chunk,), part in rows.partition_by(CHUNK, as_dict=True, maintain_order=True).items()
        }  # fmt: skip
        sizes = [part.height for part in chunks.values() if part.height >= config.min_rows]
        reference_hash = self.references.file_hash(path)
        fit: Any = None
        if sizes:
            name = fit_name(config, served.version, reference_hash=reference_hash, served_rows=sizes)
            fit, _ = self.fit(served.version, name, sizes)
        measuring = self.measuring()
        where = options(find_nodes(config.placement))
        metric = METRIC_NAMES[Task(served.version.task)]
        results = measuring.ray.get(
            [
                measuring.measure_rows.options(**where).remote(
                    served.version, self.actor.access, part, fit, config.min_rows
                )
                for part in chunks.values()
            ]
        )
        figures = summary(config, served, combine(results), metric=metric, num_large=len(sizes))
        odd_outcomes = 0 if rows.is_empty() else int(rows["odd_outcome"].sum())
        figures["left_out"] = _left_out(served, odd_outcomes, 0, log.unknown_rows, {})
        ids = [] if rows.is_empty() else rows["prediction_id"].to_list()
        predictions_hash = hashlib.sha256("".join(sorted(ids)).encode()).hexdigest()
        return Measured(served, figures, reference_hash, predictions_hash, {})

    def fit(self, version: ModelVersion, name: FitName, sizes: list[int]) -> tuple[Any, str]:
        """Return a reference to the fit of a version in Ray's object store, and the SHA-256 of its stored form.

        The stored fit is used if there is one. Otherwise NannyML is fitted, and the fit is stored.
        """
        access, measuring = self.actor.access, self.measuring()
        where = options(find_nodes(self.config.placement))
        if (stored := stored_fit(self._folder, name, self.ledger)) is not None:
            return measuring.read_fit.options(**where).remote(stored, name, access), hashlib.sha256(
                stored
            ).hexdigest()
        _, source = self.references.of(version)
        rows = reference_rows(source, version, self.config)
        # Ray's types do not know that a task with `num_returns=2` gives two references.
        references: Any = measuring.fit_version.options(**where).remote(
            version, access, rows, self.config.label, typical_rows(sizes), name
        )
        fit, sealed = references
        measuring.prepare_workers(where)
        data: bytes = measuring.ray.get(sealed)
        if not data:
            return fit, ""
        write_bytes(f"{self._folder}/{name.file}", data)
        return fit, hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _VersionRun:
    """One version under one variant in one run."""

    run: MonitorRun
    counts: LogCounts
    served: ServedVersion
    chunks: dict[str, ChunkContent]
    """Chunks with an answered row."""

    def measure(self) -> Measured:
        config, version = self.run.config, self.served.version
        path, _ = self.run.references.path_of(version)
        reference_hash = self.run.references.file_hash(path)
        sizes = [one.answered for one in self.chunks.values() if one.answered >= config.min_rows]
        name = None
        if sizes:
            name = fit_name(config, version, reference_hash=reference_hash, served_rows=sizes)
        digests = {chunk: _digest(config, version, name, chunk, one) for chunk, one in self.chunks.items()}
        results, fits = self._results(name, sizes, digests)
        metric = METRIC_NAMES[Task(version.task)]
        combined = combine(results[chunk].figures for chunk in self.chunks if chunk in results)
        figures = summary(config, self.served, combined, metric=metric, num_large=len(sizes))
        figures["left_out"] = _left_out(
            self.served,
            sum(result.odd_outcomes for result in results.values()),
            self.counts.unknown_predictions,
            sum(result.unknown_rows for result in results.values()),
            _sum_counts(result.odd_inputs for result in results.values()),
        )
        predictions_hash = _hash({chunk: one.records for chunk, one in self.chunks.items()})
        return Measured(self.served, figures, reference_hash, predictions_hash, fits)

    def _results(
        self, name: FitName | None, sizes: list[int], digests: dict[str, str]
    ) -> tuple[dict[str, ChunkResult], dict[str, str]]:
        """Return the result of each chunk, and the SHA-256 of the fit by its name if a fit was needed."""
        kept, file = (
            self.run._kept(),
            f"chunks/{self.run.config.period.value}/{result_name(self.served)}.sealed",
        )
        stored = kept.read(file).get("chunks", {})
        results = {
            chunk: ChunkResult(**stored[chunk]["result"])
            for chunk, digest in digests.items()
            if stored.get(chunk, {}).get("digest") == digest
        }
        todo = {chunk: one for chunk, one in self.chunks.items() if chunk not in results}
        if not todo:
            return results, {}
        fit, sha256 = (None, "") if name is None else self.run.fit(self.served.version, name, sizes)
        measuring = self.run.measuring()
        work = measuring.plan_work(
            self.counts,
            todo,
            version=self.served.version,
            variant=self.served.variant,
            period=self.run.config.period,
            min_rows=self.run.config.min_rows,
            access=self.run.actor.access,
        )
        where = run_options(self.counts.predictions, self.run.config.placement)
        for measured in measuring.few_at_a_time(
            measuring.measure_log_chunks.options(**where).remote(one, fit) for one in work
        ):
            results |= measured
            # After each task, so that a run that is killed measures no chunk twice.
            kept.write(
                file,
                {
                    "chunks": {
                        chunk: {"digest": digests[chunk], "result": result._asdict()}
                        for chunk, result in results.items()
                    }
                },
            )
        return results, {name.digest: sha256} if name is not None and sha256 else {}


def summary(
    config: MonitorConfig, served: ServedVersion, figures: Figures, *, metric: str, num_large: int
) -> Figures:
    """Return the figures of a version with their head: variant, version, metric, rows, outcomes and status.

    Args:
        config: Configuration of the run.
        served: The version.
        figures: The figures of all chunks.
        metric: Name of the performance metric.
        num_large: Number of chunks with at least `min_rows` rows.
    """
    periods = figures["periods"].values()
    if not periods:
        status = "no row has a score: nothing to measure"
    elif num_large:
        status = "measured"
    else:
        status = f"no chunk has {config.min_rows} rows: nothing to measure"
    return {
        "variant": served.variant,
        "version": served.version.version,
        "metric": metric,
        "rows": sum(period["rows"] for period in periods),
        "outcomes": sum(period["outcomes"] for period in periods),
        "status": status,
    } | figures


def result_name(served: ServedVersion) -> str:
    """Return the file name, without suffix, of a version's results.

    In the log of an older release, the variant can be any text that a client sent.
    """
    variant = file_name(served.variant)
    if len(variant) > MAX_VARIANT_CHARS:
        variant = f"{variant[:MAX_VARIANT_CHARS]}-{hashlib.sha256(variant.encode()).hexdigest()[:16]}"
    return f"{variant}-v{served.version.version}"


def _digest(
    config: MonitorConfig, version: ModelVersion, name: FitName | None, chunk: str, content: ChunkContent
) -> str:
    """Return the SHA-256 of everything that the result of a chunk depends on."""
    return _hash(
        {
            "fit": None if name is None else name.digest,
            "manifest": version.manifest_hash,
            "min_rows": config.min_rows,
            "chunk": chunk,
            "content": asdict(content),
        }
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _left_out(
    served: ServedVersion,
    odd_outcomes: int,
    unknown_predictions: int,
    unknown_rows: int,
    odd_inputs: Mapping[str, int],
) -> dict[str, int]:
    """By reason, count the rows and values that no figure includes, and the outcomes without a logged answer."""
    counts = {
        "rows_without_score": served.failed,
        "odd_outcomes": odd_outcomes,
        "outcomes_of_unknown_predictions": unknown_predictions,
        "outcomes_of_unknown_rows": unknown_rows,
    }
    return counts | {f"odd_values_of_{name}": count for name, count in odd_inputs.items()}


def _sum_counts(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total
