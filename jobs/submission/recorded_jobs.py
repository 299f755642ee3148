"""Submitted jobs, as the ledger has them."""

from __future__ import annotations

import datetime as dt
import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import rfc8785
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import JobFinished, JobStarted, JobStopped, JobSubmitted
from cluster.ledger.projection import Projection
from cluster.security.tokens.principal import Principal, principal_as_json, principal_from_json

METADATA = sa.MetaData()
UNFINISHED = sa.Table(
    "unfinished_jobs_1",
    METADATA,
    sa.Column("job", sa.String(128), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
)
"""The jobs that are not finished, each with the `seq` of its `JobSubmitted`."""
_CHANGES = frozenset({JobSubmitted.__name__, JobFinished.__name__})
PENDING, RUNNING, STOPPING = "pending", "running", "stopping"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A submitted job."""

    id: str
    module: str
    overrides: tuple[str, ...]
    content: str
    principal: Principal
    config_dir: str | None
    submitted_at: dt.datetime

    @property
    def submitter(self) -> str:
        return self.principal.subject


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """How far a job has come."""

    status: str
    """`pending`, `running`, `stopping`, or how it ended: see `JobFinished.state`."""
    exit_code: int | None = None
    seconds: float | None = None
    reason: str = ""
    is_over: bool = False


def new_id(principal: Principal, key: str | None) -> str:
    """Return the id of a new job. With a client key it depends on the caller and the key alone."""
    if key is None:
        return f"job-{secrets.token_hex(12)}"
    return f"job-{_digest([principal.tenant, principal.subject, key])[:24]}"


def content_hash(principal: Principal, module: str, overrides: Sequence[str]) -> str:
    """Return the hash of all that decides what a job does: module, overrides and the caller's rights."""
    return _digest([principal_as_json(principal), module, list(overrides)])


def submitted_event(
    job: str, principal: Principal, module: str, overrides: Sequence[str], *, config_dir: str | None
) -> JobSubmitted:
    """Return the event of a new job."""
    return JobSubmitted(
        job=job,
        submitter=principal.subject,
        module=module,
        overrides=list(overrides),
        content=content_hash(principal, module, overrides),
        principal=principal_as_json(principal),
        config_dir=config_dir,
    )


def find(ledger: Ledger, job: str) -> Job | None:
    """Return a job, or None if no job has this id."""
    entry = ledger.newest(JobSubmitted, job=job)
    return None if entry is None else job_of(entry)


def newest_jobs(ledger: Ledger, *, submitter: str | None, count: int) -> list[Job]:
    """Return the newest jobs, the last one first: those of one submitter, or with None all."""
    of_whom = {} if submitter is None else {"submitter": submitter}
    return [job_of(entry) for entry in islice(ledger.find(JobSubmitted, newest_first=True, **of_whom), count)]


def unfinished_jobs(ledger: Ledger) -> Iterator[Job]:
    """Yield the jobs that are not finished, in the order in which they were submitted.

    A projection has them, so the number of finished jobs does not matter.
    """
    projection = Projection(
        ledger, name=UNFINISHED.name, metadata=METADATA, wanted=_CHANGES.__contains__, apply=_apply
    )
    with projection.reading() as connection:
        positions = connection.execute(sa.select(UNFINISHED.c.seq).order_by(UNFINISHED.c.seq)).scalars().all()
    for seq in positions:
        entry = ledger.get(seq)
        assert entry is not None
        yield job_of(entry)


def state_of(ledger: Ledger, job: str) -> JobState:
    """Return how far a job has come."""
    finished = ledger.newest(JobFinished, job=job)
    if finished is not None:
        payload = finished.payload
        return JobState(
            status=str(payload["state"]),
            exit_code=payload["exit_code"],
            seconds=float(payload["seconds"]),
            reason=str(payload["reason"]),
            is_over=True,
        )
    if is_stopped(ledger, job):
        return JobState(status=STOPPING)
    return JobState(status=RUNNING if has_started(ledger, job) else PENDING)


def has_started(ledger: Ledger, job: str) -> bool:
    """Return whether the process of a job has started."""
    return ledger.newest(JobStarted, job=job) is not None


def is_stopped(ledger: Ledger, job: str) -> bool:
    """Return whether the submitter or an admin has stopped a job."""
    return ledger.newest(JobStopped, job=job) is not None


def job_of(entry: Entry) -> Job:
    """Return the job of an event `JobSubmitted`."""
    payload: dict[str, Any] = entry.payload
    return Job(
        id=str(payload["job"]),
        module=str(payload["module"]),
        overrides=tuple(payload["overrides"]),
        content=str(payload["content"]),
        principal=principal_from_json(payload["principal"]),
        config_dir=payload["config_dir"],
        submitted_at=dt.datetime.fromisoformat(entry.time),
    )


def _apply(connection: sa.Connection, entry: Entry) -> None:
    """Add a submitted job, or remove a finished one."""
    job = entry.payload["job"]
    connection.execute(UNFINISHED.delete().where(UNFINISHED.c.job == job))
    if entry.type == JobSubmitted.__name__:
        connection.execute(UNFINISHED.insert().values(job=job, seq=entry.seq))


def _digest(value: Any) -> str:
    return hashlib.sha256(rfc8785.dumps(value)).hexdigest()
