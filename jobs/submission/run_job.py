"""`python -m jobs.submission.run_job job=<id>`: run the command of a submitted job.

The job service starts it as a Ray job. The process records the start, runs the command as a child with the caller's
rights, and records the end. If another process has recorded this job's start, it does nothing.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from cluster.entrypoint import job
from cluster.errors import ConfigError, first_line
from cluster.ledger import open_ledger
from cluster.ledger.events import JobFinished, JobStarted
from cluster.security.private_folder import require_unchangeable
from cluster.security.recorded_settings import apply_cluster_record
from cluster.security.tokens.intent import FILE_VARIABLE, mint_intent
from cluster.security.tokens.issuer import TOKEN_TTL_S
from cluster.session import ClusterRecord, require_recorded_cluster
from cluster.settings import PlatformConfig
from cluster.storage import Layout, local
from jobs.child_process import execute
from jobs.command_states import NOT_STARTED, STOPPED
from jobs.principal_tokens import access_token, renewed_token
from jobs.submission import recorded_jobs
from jobs.submission.modules import PIPELINE
from jobs.submission.overrides import LOADS
from jobs.submission.recorded_jobs import Job
from jobs.submission.runner import ACTOR, intent_name

INTENTS = "job_intents"
"""Folder below `keys/` with the intents that callers sent."""


@dataclass(kw_only=True, slots=True)
class RunJobConfig(PlatformConfig):
    """Configuration of `jobs.submission.run_job`."""

    job: str = ""
    """Id of the job."""


@job("run_job", RunJobConfig)
def main(config: RunJobConfig) -> None:
    """Run the job's command, and exit with its exit code."""
    record, ledger = require_recorded_cluster(config), open_ledger(config)
    apply_cluster_record(record, config)
    found = recorded_jobs.find(ledger, config.job)
    if found is None:
        raise ConfigError(f"No job '{config.job}' was submitted.")
    if recorded_jobs.has_started(ledger, found.id):
        print(f"job {found.id} has run already")
        return
    try:
        require_unchangeable(found.config_dir, loads=LOADS)
    except ConfigError as error:
        refused = JobFinished(job=found.id, state=NOT_STARTED, reason=first_line(error))
        ledger.append_once(refused, actor=ACTOR, job=found.id)
        raise
    command = command_line(found)
    started = JobStarted(job=found.id, command=command[2:])
    if recorded_jobs.is_stopped(ledger, found.id):
        print(f"job {found.id} was stopped")
        return
    if ledger.append_once(started, actor=ACTOR, job=found.id) is None:
        print(f"job {found.id} has run already")
        return
    with callers_intent(config, record, found) as variables:
        ended = execute(command, folder=record.project_root, variables=variables)
    finished = JobFinished(
        job=found.id,
        state=STOPPED if ended.was_stopped else ended.state,
        exit_code=ended.exit_code,
        seconds=ended.seconds,
        reason=ended.reason,
    )
    ledger.append_once(finished, actor=ACTOR, job=found.id)
    sys.exit(ended.exit_code)


def command_line(found: Job) -> list[str]:
    """Return the job's command line: program, module and options."""
    folder = () if found.config_dir is None else ("--config-dir", found.config_dir)
    return [sys.executable, "-m", found.module, *folder, *found.overrides]


def callers_intent(
    config: PlatformConfig, record: ClusterRecord, found: Job
) -> AbstractContextManager[dict[str, str]]:
    """Return a context with the variable that names the file of the job's intent: the caller's, for this module only.

    With the development issuer, this process creates a short-lived intent and renews it until the command ends. A
    pipeline gets an access token, because each of its commands needs its own intent. With an OIDC issuer, the caller
    sent the intent, and nobody can renew it.
    """
    if config.identity.issuer.url is not None:
        return nullcontext({FILE_VARIABLE: str(intent_folder(record.layout) / intent_name(found.id))})
    places, principal = record.layout, found.principal

    def new_token() -> str:
        if found.module == PIPELINE:
            return access_token(places, principal)
        return mint_intent(places, principal, entrypoint=found.module, ttl_s=TOKEN_TTL_S)

    return renewed_token(places, kind="job", new_token=new_token)


def intent_folder(places: Layout) -> Path:
    """Return the folder with the intents that callers sent."""
    return local(places.keys) / INTENTS


if __name__ == "__main__":
    main()
