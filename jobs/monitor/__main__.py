"""`python -m jobs.monitor name=m`: performance and drift of each served version."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from cluster.entrypoint import job
from cluster.errors import TrainingSetError
from cluster.ledger import open_ledger
from cluster.ledger.events import ModelMonitored
from cluster.records.edge_counts.refusals import read_refusals
from cluster.records.progress import ages_as_json
from cluster.security.acting import create_actor
from cluster.security.encryption.access import protected_files
from cluster.session import attach, require_running_cluster, use_cluster
from cluster.storage import exists, layout, resolve, write_bytes, write_json
from jobs.monitor.calculation.combining import Figures
from jobs.monitor.calculation.ranking import rank_alerts
from jobs.monitor.config import MonitorConfig
from jobs.monitor.logged import ServedVersion
from jobs.monitor.plots import performance_plot
from jobs.monitor.reference import References
from jobs.monitor.report import Output, alerting_chunks, describe, describe_traffic
from jobs.monitor.run import Measured, MonitorRun, result_name
from jobs.monitor.scored import read_scored
from jobs.monitor.traffic import as_json, judge_traffic, unusual_hours, with_refusals
from jobs.train.data import read_training_set

TRAFFIC = "traffic.json"
"""File with all judged hours. Other results have only the unusual ones, because a pipeline's events contain these."""


@job("monitor", MonitorConfig, timed=True)
def main(config: MonitorConfig) -> dict[str, Any]:
    """Measure each version under each of its variants. Print and write the results, and append one event for each."""
    if config.reference is not None and not exists(resolve(config.reference)):
        raise TrainingSetError(
            f"No reference at {resolve(config.reference)}. Give the training set of the model."
        )
    ledger = open_ledger(config)
    record = require_running_cluster(config)
    use_cluster(record)
    actor = create_actor(config, record, ledger, entrypoint="jobs.monitor")
    places = layout(config.storage)
    files = protected_files(actor.access)
    references = References(
        config.reference, lambda path: read_training_set(path, files, places=places, ledger=ledger)
    )
    folder = f"{places.monitor(config.name)}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    run = MonitorRun(
        config=config,
        places=places,
        ledger=ledger,
        actor=actor,
        references=references,
        attach=lambda: attach(config),
    )
    logs: dict[str, Any] = {}
    traffic: dict[str, Any] = {}
    measured: Iterable[Measured]
    if config.predictions is not None:
        measured = [run.measure_scores(read_scored(config, ledger, actor.access))]
    else:
        ages = run.log_ages()
        for age in ages:
            print(f"log: {age}", flush=True)
        logs = ages_as_json(ages)
        counts = run.count()
        refusals = read_refusals(ledger.engine, config.name)
        judged = as_json(judge_traffic(with_refusals(counts.hours(), refusals), until=ages[0].until))
        write_json(f"{folder}/{TRAFFIC}", judged)
        traffic = unusual_hours(judged)
        for line in describe_traffic(traffic):
            print(f"{config.name}: {line}", flush=True)
        measured = run.measure_log(counts)
    output = Output()
    for one in measured:
        figures = one.figures | {"logs": logs, "traffic": traffic, "ranking": rank_alerts(one.figures)}
        for line in describe(one.served.name, figures):
            print(line, flush=True)
        results = f"{folder}/{result_name(one.served)}"
        write_results(one.served, figures, results)
        event = monitored_event(config, one, traffic=traffic, results=f"{results}.json")
        ledger.append(event, actor=actor.name)
        output.add(one.served, figures)
    content = output.content() | {"logs": logs, "traffic": traffic}
    if config.output is not None:
        write_json(resolve(config.output), content)
    return content


def write_results(served: ServedVersion, figures: Figures, path: str) -> None:
    """Write `<path>.json`. If any period has a performance, write its plot `<path>.svg` too."""
    write_json(f"{path}.json", figures)
    if any(period["estimate"] or period["realisation"] for period in figures["periods"].values()):
        plot = performance_plot(served.name, figures["periods"], metric=figures["metric"])
        write_bytes(f"{path}.svg", plot.encode())


def monitored_event(
    config: MonitorConfig, measured: Measured, *, traffic: dict[str, Any], results: str
) -> ModelMonitored:
    """Return the ledger event that says that a version was monitored.

    Args:
        config: Configuration of the run.
        measured: The version with its figures.
        traffic: Hours with unusual traffic of the model, by kind.
        results: Path of the result file.
    """
    served, figures = measured.served, measured.figures
    return ModelMonitored(
        model=config.name,
        variant=served.variant,
        version=served.version.version,
        periods=figures["periods"],
        drift=alerting_chunks(figures["drift"]),
        missing=alerting_chunks(figures["missing"]),
        unseen=alerting_chunks(figures["unseen"]),
        reconstruction=[chunk for chunk, one in figures["reconstruction"].items() if one["alert"]],
        traffic=alerting_chunks(traffic),
        undefined=figures["undefined"],
        left_out=figures["left_out"],
        inputs={"reference": measured.reference_hash, "predictions": measured.predictions_hash},
        results="/".join(results.rsplit("/", 2)[1:]),
        fits=measured.fits,
    )


if __name__ == "__main__":
    main()
