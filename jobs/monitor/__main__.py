"""`python -m jobs.monitor name=m`: performance and drift of each served version."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

from cluster.entrypoint import job
from cluster.errors import TrainingSetError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ModelMonitored
from cluster.records.progress import ages_as_json
from cluster.security.acting import Actor, create_actor
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from cluster.session import attach
from cluster.storage import exists, file_name, layout, resolve, write_bytes, write_json
from jobs.monitor.config import MonitorConfig
from jobs.monitor.figures import Figures, measure_version
from jobs.monitor.logged import ServedVersion, read_served_log
from jobs.monitor.plots import performance_plot
from jobs.monitor.reference import References, reference_rows
from jobs.monitor.report import Output, alerting_chunks, describe
from jobs.monitor.scored import read_scored
from jobs.train.data import read_training_set

MAX_VARIANT_CHARS = 100
"""Largest number of characters of a variant's name in a file name; a longer name is cut and gets a hash."""


@job("monitor", MonitorConfig, timed=True)
def main(config: MonitorConfig) -> dict[str, Any]:
    """Measure each version under each of its variants. Print and write the results, and append one event for each."""
    if config.reference is not None and not exists(resolve(config.reference)):
        raise TrainingSetError(
            f"No reference at {resolve(config.reference)}. Give the training set of the model."
        )
    ledger = open_ledger(config)
    actor = create_actor(config, attach(config), ledger, entrypoint="jobs.monitor")
    places = layout(config.storage)
    files = protected_files(actor.access)
    references = References(
        config.reference, lambda path: read_training_set(path, files, places=places, ledger=ledger)
    )
    folder = f"{places.monitor(config.name)}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    if config.predictions is not None:
        logged = read_scored(config, ledger, actor.access)
    else:
        logged = read_served_log(config, ledger, key_store(actor.access))
    for age in logged.ages:
        print(f"log: {age}", flush=True)
    run = MonitorRun(config, references, folder, ledger, actor, ages_as_json(logged.ages))
    output = Output()
    for served in logged.served:
        figures = run.monitor(served, left_out=logged.left_out(served))
        output.add(served, figures)
    content = output.content() | {"logs": run.logs}
    if config.output is not None:
        write_json(resolve(config.output), content)
    return content


@dataclass(frozen=True, slots=True)
class MonitorRun:
    """What all versions of one monitoring run have in common."""

    config: MonitorConfig
    references: References
    """Reads the reference of each version."""
    folder: str
    """Folder for the results."""
    ledger: Ledger
    actor: Actor
    logs: dict[str, Any]
    """How complete the logs are."""

    def monitor(self, served: ServedVersion, *, left_out: dict[str, int]) -> Figures:
        """Measure one version, print and write its figures, and append its event.

        Args:
            served: Answers of the version.
            left_out: Number of rows and outcomes that no figure includes, by reason.
        """
        path, source = self.references.of(served.version)
        reference = reference_rows(source, served.version, self.config)
        figures = measure_version(self.config, served, reference, access=self.actor.access)
        figures |= {"left_out": left_out, "logs": self.logs}
        for line in describe(served.name, figures):
            print(line, flush=True)
        results = f"{self.folder}/{result_name(served)}"
        write_results(served, figures, results)
        event = monitored_event(
            self.config,
            served,
            figures,
            reference_hash=self.references.file_hash(path),
            results=f"{results}.json",
        )
        self.ledger.append(event, actor=self.actor.name)
        return figures


def write_results(served: ServedVersion, figures: Figures, path: str) -> None:
    """Write `<path>.json`. If any period has a performance, write its plot `<path>.svg` too."""
    write_json(f"{path}.json", figures)
    if any(period["estimate"] or period["realisation"] for period in figures["periods"].values()):
        plot = performance_plot(served.name, figures["periods"], metric=figures["metric"])
        write_bytes(f"{path}.svg", plot.encode())


def result_name(served: ServedVersion) -> str:
    """Return the file name, without suffix, of a version's results.

    In the log of an older release, the variant can be any text that a client sent.
    """
    variant = file_name(served.variant)
    if len(variant) > MAX_VARIANT_CHARS:
        variant = f"{variant[:MAX_VARIANT_CHARS]}-{hashlib.sha256(variant.encode()).hexdigest()[:16]}"
    return f"{variant}-v{served.version.version}"


def monitored_event(
    config: MonitorConfig, served: ServedVersion, figures: Figures, *, reference_hash: str, results: str
) -> ModelMonitored:
    """Return the ledger event that says that a version was monitored.

    Args:
        config: Configuration of the run.
        served: Answers of the version.
        figures: Figures of the version.
        reference_hash: SHA-256 of the reference file.
        results: Path of the result file.
    """
    prediction_ids: list[Any] = [] if served.rows.is_empty() else served.rows["prediction_id"].to_list()
    predictions_hash = hashlib.sha256("".join(sorted(prediction_ids)).encode()).hexdigest()
    return ModelMonitored(
        model=config.name,
        variant=served.variant,
        version=served.version.version,
        periods=figures["periods"],
        drift=alerting_chunks(figures["drift"]),
        missing=alerting_chunks(figures["missing"]),
        unseen=alerting_chunks(figures["unseen"]),
        undefined=figures["undefined"],
        left_out=figures["left_out"],
        inputs={"reference": reference_hash, "predictions": predictions_hash},
        results="/".join(results.rsplit("/", 2)[1:]),
    )


if __name__ == "__main__":
    main()
