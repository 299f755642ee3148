"""`python -m jobs.submission.service`: the service for submitted jobs, behind the edge.

`cluster.up` starts it on the head, and the supervisor keeps it alive. It is a process of its own, so that requests of
callers can neither delay nor end the scheduler or a prediction. It listens on a socket in the cluster's private folder,
so only the edge's user can reach it, and no other user of the machine can take its place.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa

from cluster.entrypoint import job
from cluster.errors import FalajError, RefusedError, first_line
from cluster.host.http_socket import listening
from cluster.host.processes import exit_at_once
from cluster.host.signals import set_on_signal
from cluster.ledger import Ledger, open_ledger
from cluster.metrics import new_registry, serve_metrics
from cluster.node.locks import hold_lock
from cluster.node.scheduling import wait_for_turn
from cluster.security.authorization.audit import DecisionRecorder, start_flushing
from cluster.security.authorization.policy import Policy
from cluster.security.recorded_settings import apply_cluster_record
from cluster.security.tokens.trust import Trust
from cluster.session import ClusterRecord, record_path, require_recorded_cluster
from cluster.settings import PlatformConfig
from cluster.storage import resolve
from jobs.submission.http import JobApi
from jobs.submission.metrics import JobMetrics
from jobs.submission.operations import JobOperations
from jobs.submission.overrides import JobRules
from jobs.submission.paths import PathRules
from jobs.submission.ray_jobs import SubmittedJobs
from jobs.submission.run_job import intent_folder
from jobs.submission.runner import JobRunner

EVERY_S = 0.5
FLUSH_S = 60.0
RETRY_S = 2.0
LOG = logging.getLogger("falaj.jobs")
T = TypeVar("T")


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    wait_for_turn()
    record, stopped = require_recorded_cluster(config), threading.Event()
    set_on_signal([signal.SIGTERM], stopped)
    apply_cluster_record(record, config)
    registry = new_registry()
    metrics = JobMetrics(registry)
    serve_metrics(registry, port=record.ports.get("jobs_metrics"))
    refusal = "Another job service (pid {pid}) runs for {folder}. `python -m cluster.status` shows it."
    with hold_lock(Path(record_path(config.storage)).with_name("jobs.lock"), refusal):
        ledger = retry(lambda: open_ledger(config), stopped)
        runner = None if ledger is None else retry(lambda: new_runner(config, record, ledger), stopped)
        if ledger is not None and runner is not None:
            serve(job_operations(config, record, ledger, runner), record, metrics, stopped)
    exit_at_once()  # a thread of Ray's client may wait


def retry(call: Callable[[], T], stopped: threading.Event) -> T | None:
    """Return a call's result. While the ledger's database is down, call again; return None if stopped."""
    while not stopped.is_set():
        try:
            return call()
        except sa.exc.SQLAlchemyError as error:
            LOG.warning("the ledger cannot be read: %s", first_line(error))
            stopped.wait(RETRY_S)
    return None


def serve(
    operations: JobOperations, record: ClusterRecord, metrics: JobMetrics, stopped: threading.Event
) -> None:
    """Answer requests and run jobs until `stopped` is set."""
    runner = operations.runner
    metrics.count_unfinished(lambda: len(runner.unfinished()))
    flusher = start_flushing(operations.decisions, every_s=FLUSH_S, stopped=stopped)
    with listening(JobApi(operations, record, metrics).app(), Path(record.jobs_socket)):
        while not stopped.wait(EVERY_S):
            try:
                if runner.check_once():
                    metrics.last_check.set_to_current_time()
            except (sa.exc.SQLAlchemyError, FalajError, RefusedError, OSError) as error:
                LOG.warning("the jobs could not be read: %s", first_line(error))
                stopped.wait(RETRY_S)
    flusher.join(RETRY_S)


def new_runner(config: PlatformConfig, record: ClusterRecord, ledger: Ledger) -> JobRunner:
    """Return what runs the jobs. It reads the unfinished jobs from the ledger."""
    return JobRunner(
        ledger,
        SubmittedJobs(record),
        intents=intent_folder(record.layout),
        max_running=config.jobs.max_running,
    )


def job_operations(
    config: PlatformConfig, record: ClusterRecord, ledger: Ledger, runner: JobRunner
) -> JobOperations:
    """Return the operations of callers, with the cluster's identity settings."""
    folder = config.jobs.config_dir
    settings = replace(config.jobs, config_dir=None if folder is None else resolve(folder))
    return JobOperations(
        ledger=ledger,
        runner=runner,
        trust=Trust.of(config.identity.issuer, record.layout),
        policy=Policy.load(region=config.cluster.region),
        environment=config.identity.environment,
        region=config.cluster.region,
        decisions=DecisionRecorder(ledger.append),
        rules=JobRules(settings=settings, paths=PathRules.of(record, settings.allowed_paths)),
        intents=intent_folder(record.layout),
        issues_intents=config.identity.issuer.url is None,
    )


if __name__ == "__main__":
    main()
