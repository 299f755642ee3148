"""`python -m jobs.monitor name=m reference=train.parquet label=y`: estimate, realise, look for drift, per variant.

NannyML runs in a Ray task, so that the job shows on the dashboard and takes its place among the cluster's CPUs.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import Any

import polars as pl
import ray

from cluster.entrypoint import job
from cluster.errors import ConfigError, TrainingSetError, did_you_mean
from cluster.ledger import open_ledger
from cluster.ledger.events import ModelMonitored
from cluster.registry import ModelVersion, Registry
from cluster.runtime import Task, load_model
from cluster.security.acting import act
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess, key_store
from cluster.session import attach
from cluster.storage import exists, file_name, layout, resolve, sha256, write_bytes, write_json
from jobs.monitor.chunks import CHUNK, cut
from jobs.monitor.config import MonitorConfig
from jobs.monitor.frames import Frames, build
from jobs.monitor.logged import Served, read
from jobs.monitor.measures import METRICS, SHORT, Measure, Measures, drift, estimated, realised
from jobs.monitor.plots import performance_plot
from jobs.monitor.said import Output, alerted, describe
from jobs.monitor.shares import missing_shares, unseen_shares
from jobs.train.config import AUTO, SplitConfig
from jobs.train.data import TrainingSet, read_training_set
from jobs.train.split import held_out_of

MAX_VARIANT_CHARS = 100
"""Of a file's name."""


@job("monitor", MonitorConfig, timed=True)
def main(config: MonitorConfig) -> None:
    """Measure every version under each variant that it answered as, and write results, plots and events."""
    reference_uri = resolve(config.reference)
    if not exists(reference_uri):
        raise TrainingSetError(f"No reference at {reference_uri}. Give the training set of the model.")
    ledger = open_ledger(config)
    actor = act(config, attach(config), ledger, entrypoint="jobs.monitor")
    files = protected_files(actor.access)
    places = layout(config.storage)
    source = read_training_set(config.reference, files, places=places, ledger=ledger)
    folder = f"{places.monitor(config.name)}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    logged = read(config, Registry(ledger, places), key_store(actor.access))
    output = Output()
    for served in logged.served:
        reference = held_out(source, served.version, config)
        figures = measure(config, served, reference, access=actor.access) | {
            "left_out": logged.left_out(served)
        }
        output.add(served, figures)
        for line in describe(served.name, figures):
            print(line, flush=True)
        name = results_name(served)
        write_json(f"{folder}/{name}.json", figures)
        if any(one["estimate"] or one["realisation"] for one in figures["periods"].values()):
            plot = performance_plot(served.name, figures["periods"], metric=figures["metric"])
            write_bytes(f"{folder}/{name}.svg", plot.encode())
        event = event_of(
            config, served, figures, reference=sha256(reference_uri), results=f"{folder}/{name}.json"
        )
        ledger.append(event, actor=actor.name)
    if config.output is not None:
        write_json(resolve(config.output), output.content())


def results_name(served: Served) -> str:
    """Of a version's results; in the log of an older release a variant can be a client's word, of any length."""
    variant = file_name(served.variant)
    if len(variant) > MAX_VARIANT_CHARS:
        variant = f"{variant[:MAX_VARIANT_CHARS]}-{hashlib.sha256(variant.encode()).hexdigest()[:16]}"
    return f"{variant}-v{served.version.version}"


def event_of(
    config: MonitorConfig, served: Served, figures: dict[str, Any], *, reference: str, results: str
) -> ModelMonitored:
    """What the ledger is told."""
    identities = [] if served.rows.is_empty() else served.rows["prediction_id"].to_list()
    digest = hashlib.sha256("".join(sorted(identities)).encode()).hexdigest()
    return ModelMonitored(
        model=config.name,
        variant=served.variant,
        version=served.version.version,
        periods=figures["periods"],
        drift=alerted(figures["drift"]),
        missing=alerted(figures["missing"]),
        unseen=alerted(figures["unseen"]),
        undefined=figures["undefined"],
        left_out=figures["left_out"],
        inputs={"reference": reference, "predictions": digest},
        results="/".join(results.rsplit("/", 2)[1:]),
    )


def held_out(source: TrainingSet, version: ModelVersion, config: MonitorConfig) -> pl.DataFrame:
    """The reference's rows that a version was not fitted on, in order of time.

    Raises:
        TrainingSetError: a column is missing, or no row is left.
        ConfigError: half a split.
    """
    reference = pl.DataFrame(pl.from_arrow(source.table))
    if config.timestamp not in reference.columns:
        raise TrainingSetError(
            f"The reference has no column '{config.timestamp}'.{did_you_mean(config.timestamp, reference.columns)} "
            "Set `timestamp` to the column that says when a row was true."
        )
    split = config.split or SplitConfig(column=None)
    if split.column == AUTO and split != SplitConfig():
        raise ConfigError(
            "Name `split.column` beside split.modulo and split.remainder: `auto` takes the version's own split."
        )
    if split.column is not None:
        instead = None if split.column == AUTO else split
        otherwise = "Give the training set, or `split.column=null` for rows that no version was fitted on."
        mask = held_out_of(version, source, instead=instead, otherwise=otherwise)
        reference = reference.filter(pl.Series(mask))
    if reference.is_empty():
        raise TrainingSetError(
            f"No row of the reference was held out of version {version.version}'s training. Give its training set, or "
            "`split.column=null` for rows that no version was fitted on."
        )
    return reference.sort(config.timestamp)


def measure(
    config: MonitorConfig, served: Served, reference: pl.DataFrame, *, access: KeyAccess
) -> dict[str, Any]:
    """All figures of one version by chunk; what cannot be said has a reason under `undefined`."""
    metric = SHORT[METRICS[Task(served.version.task)]]
    rows = served.rows
    head = {
        "variant": served.variant,
        "version": served.version.version,
        "metric": metric,
        "rows": rows.height,
        "outcomes": 0 if rows.is_empty() else int(rows["outcome"].is_not_null().sum()),
    }
    empty: dict[str, Any] = {"periods": {}, "drift": {}, "missing": {}, "unseen": {}, "undefined": {}}
    if rows.is_empty():
        return head | {"status": "no answer has a score: no statement"} | empty
    everything = cut(rows, config.period, min_rows=1)
    enough = everything.filter(pl.len().over(CHUNK) >= config.min_rows)
    if enough.is_empty():
        found, status = empty, f"no chunk has {config.min_rows} rows: no statement"
    else:
        task = _measure.remote(served.version, access, reference, enough, config.label, config.min_rows)
        found, status = ray.get(task), "measured"
    return head | {"status": status} | with_small(found, everything, metric=metric, min_rows=config.min_rows)


def with_small(
    found: dict[str, Any], everything: pl.DataFrame, *, metric: str, min_rows: int
) -> dict[str, Any]:
    """The figures, with the chunks that have too few rows for any."""
    periods, undefined = dict[str, Any](), {name: dict(one) for name, one in found["undefined"].items()}
    for (chunk,), rows in everything.group_by(CHUNK, maintain_order=True):
        name = str(chunk)
        periods[name] = found["periods"].get(name) or _period(metric, rows, None, None)
        if rows.height < min_rows:
            for figure in (f"estimated_{metric}", f"realised_{metric}", "drift"):
                undefined.setdefault(figure, {})[name] = f"chunk below min_rows: {rows.height} of {min_rows}"
    return found | {"periods": periods, "undefined": undefined}


def _period(
    metric: str, rows: pl.DataFrame, estimate: Measure | None, realisation: Measure | None
) -> dict[str, Any]:
    return {
        f"estimated_{metric}": None if estimate is None else estimate.value,
        f"realised_{metric}": None if realisation is None else realisation.value,
        "rows": rows.height,
        "outcomes": int(rows["outcome"].is_not_null().sum()),
        "estimate": None if estimate is None else asdict(estimate),
        "realisation": None if realisation is None else asdict(realisation),
    }


@ray.remote
def _measure(
    version: ModelVersion,
    access: KeyAccess,
    reference: pl.DataFrame,
    served: pl.DataFrame,
    label: str,
    min_outcomes: int,
) -> dict[str, Any]:
    model = load_model(version, key_store(access))
    frames = build(model=model, reference=reference, served=served, label=label)
    return figures_of(frames, served, min_outcomes=min_outcomes)


def figures_of(frames: Frames, served: pl.DataFrame, *, min_outcomes: int) -> dict[str, Any]:
    """Everything that is measured of one version."""
    estimates, realisations = estimated(frames), realised(frames, min_outcomes=min_outcomes)
    distances, metric = drift(frames), SHORT[METRICS[frames.task]]
    periods = {
        chunk: _period(
            metric,
            served.filter(pl.col(CHUNK) == chunk),
            estimates.measures.get(chunk),
            realisations.measures.get(chunk),
        )
        for chunk in frames.chunks
    }
    reasons = {f"estimated_{metric}": estimates.reasons, f"realised_{metric}": realisations.reasons}
    reasons |= {f"drift of {name}": figure.reasons for name, figure in distances.items()}
    return {
        "periods": periods,
        "drift": {name: _plain(figure.measures) for name, figure in distances.items()},
        "missing": {name: _plain(one) for name, one in missing_shares(frames).items()},
        "unseen": {name: _plain(one) for name, one in unseen_shares(frames).items()},
        "undefined": {name: by_chunk for name, by_chunk in reasons.items() if by_chunk},
    }


def _plain(measures: Measures) -> dict[str, Any]:
    return {chunk: asdict(one) for chunk, one in measures.items()}


if __name__ == "__main__":
    main()
