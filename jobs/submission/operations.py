"""What callers do with jobs: submit, list, show and stop them. Every request needs a valid token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import InvalidRequest, RefusedError, Unauthenticated
from cluster.host.submission import MODULE
from cluster.ledger import Ledger
from cluster.ledger.events import JobRefused, JobStopped
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.bearer import authenticate
from cluster.security.authorization.policy import Action, Policy, Resource
from cluster.security.tokens.intent import write_intent
from cluster.security.tokens.principal import Principal, principal_as_json
from cluster.security.tokens.trust import Trust
from jobs.submission import recorded_jobs
from jobs.submission.errors import JobForbidden, JobNotFound, KeyTaken, TooManyJobs
from jobs.submission.limits import MAX_NEW, MAX_REFUSED, Frequency
from jobs.submission.modules import MAX_NAME, PIPELINE
from jobs.submission.overrides import JobRules
from jobs.submission.recorded_jobs import Job, JobState
from jobs.submission.requests import Submission, parse
from jobs.submission.runner import JobRunner, intent_name

MAX_LISTED = 200
MAX_READ = 1000
"""Most jobs of a caller that are read for a list. Older ones are not listed."""
NEW, ALL = "new", "*"
"""Names, in the policies, of a job that does not exist yet, and of all jobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """A job that was submitted now, or before with the same key and content."""

    job: Job
    is_new: bool


@dataclass(kw_only=True, slots=True)
class JobOperations:
    """The operations of callers on jobs. It is thread-safe."""

    ledger: Ledger
    runner: JobRunner
    trust: Trust
    policy: Policy
    environment: str
    """The installation's environment in the policies."""
    region: str
    decisions: DecisionRecorder
    rules: JobRules
    intents: Path
    """Folder with the intents that callers sent."""
    issues_intents: bool
    """Whether the platform's own issuer creates intents. If not, each caller sends one."""
    clock: Callable[[], float] = time.time
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _hydra_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while Hydra composes a configuration: it does one at a time."""
    _refused: Frequency = field(default_factory=lambda: Frequency(MAX_REFUSED, of_what="refused requests"))
    _accepted: Frequency = field(default_factory=lambda: Frequency(MAX_NEW, of_what="new jobs"))

    def authenticate(self, authorization: str | None) -> Principal:
        """Return the principal of an Authorization header.

        Raises:
            Unauthenticated: the token is missing or not valid.
        """
        return authenticate(self.trust, self.decisions, authorization, at=self.clock())

    def submit(self, principal: Principal, body: object) -> Accepted:
        """Accept a job, or return the job that this caller has submitted with the same key.

        Raises:
            AccessDenied: the caller may not submit jobs.
            JobForbidden: no caller may submit this job. An event records it.
            InvalidRequest, ConfigError: the request is wrong.
            KeyTaken, TooManyJobs: see there.
        """
        self._check(principal, Action.submit_jobs, self._resource(NEW, submitter=principal.subject))
        for frequency in (self._refused, self._accepted):
            frequency.require_room(principal.subject, now=self.clock())
        try:
            request = self._validate(principal, body)
        except RefusedError:
            self._refused.count(principal.subject, now=self.clock())
            raise
        with self._lock:
            return self._accept(principal, request)

    def jobs(self, principal: Principal, *, count: int) -> list[tuple[Job, JobState]]:
        """Return the newest jobs that the caller may see.

        An admin or auditor sees all. Others see their own, without those that have rights which their token lacks.

        Raises:
            AccessDenied: the caller may see none.
        """
        all_jobs = self._resource(ALL, submitter="")
        most = min(count, MAX_LISTED)
        if self.policy.decide(principal, Action.read_jobs, all_jobs, environment=self.environment).allowed:
            found = recorded_jobs.newest_jobs(self.ledger, submitter=None, count=most)
        else:
            self._check(principal, Action.read_jobs, self._resource(ALL, submitter=principal.subject))
            own = recorded_jobs.newest_jobs(self.ledger, submitter=principal.subject, count=MAX_READ)
            found = [job for job in own if covers(principal, job.principal)][:most]
        return [(job, recorded_jobs.state_of(self.ledger, job.id)) for job in found]

    def job(self, principal: Principal, job: str, *, action: Action = Action.read_jobs) -> Job:
        """Return a job.

        Raises:
            JobNotFound: there is no such job.
            AccessDenied: the caller may not do the action with this job.
        """
        found = recorded_jobs.find(self.ledger, job)
        if found is None:
            self._check(principal, action, self._resource(ALL, submitter=principal.subject))
            raise JobNotFound(f"No job '{job}'.")
        owner = found.principal
        exceeds_token = not covers(principal, owner)
        self._check(
            principal,
            action,
            self._resource(job, submitter=owner.subject, tenant=owner.tenant, exceeds_token=exceeds_token),
        )
        return found

    def state(self, job: str) -> JobState:
        """Return how far a job has come."""
        return recorded_jobs.state_of(self.ledger, job)

    def stop(self, principal: Principal, job: str) -> JobState:
        """Stop a job; if it is over, change nothing. Return its state.

        Raises:
            JobNotFound: there is no such job.
            AccessDenied: the caller is neither an admin nor its submitter with a token that covers the job.
        """
        found = self.job(principal, job, action=Action.control_jobs)
        if not recorded_jobs.state_of(self.ledger, job).is_over:
            stopped = JobStopped(job=job, subject=principal.subject)
            self.ledger.append_once(stopped, actor=principal.subject, job=job)
            self.runner.watch(found)
        return recorded_jobs.state_of(self.ledger, job)

    def _resource(
        self, name: str, *, submitter: str, tenant: str = "default", exceeds_token: bool = False
    ) -> Resource:
        """Return a job, or all jobs of a submitter, as the target of an action."""
        return Resource(
            kind="job",
            name=name,
            registered_by=submitter,
            tenant=tenant,
            region=self.region,
            exceeds_token=exceeds_token,
        )

    def _validate(self, principal: Principal, body: object) -> Submission:
        """Return the submission in a body, if the rules of this installation allow it."""
        request = parse(body)
        try:
            with self._hydra_lock:
                self.rules.check(request.module, request.overrides)
        except JobForbidden as error:
            self._record_refusal(principal, request.module, error)
            raise
        self._check_intent(principal, request)
        return request

    def _check(self, principal: Principal, action: Action, resource: Resource) -> None:
        self.decisions.check(
            self.policy, principal, action, resource, environment=self.environment, at=self.clock()
        )

    def _accept(self, principal: Principal, request: Submission) -> Accepted:
        job = recorded_jobs.new_id(principal, request.key)
        content = recorded_jobs.content_hash(principal, request.module, request.overrides)
        existing = None if request.key is None else recorded_jobs.find(self.ledger, job)
        if existing is not None:
            if existing.content != content:
                raise KeyTaken(
                    f"You have submitted another job with this key: {job}. Use a new key for another module, other "
                    "overrides or another role or purpose."
                )
            return Accepted(job=existing, is_new=False)
        self._limit_jobs(principal)
        if request.intent is not None:
            self.intents.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_intent(self.intents / intent_name(job), request.intent)
        event = recorded_jobs.submitted_event(
            job, principal, request.module, request.overrides, config_dir=self.rules.settings.config_dir
        )
        self.ledger.append_once(event, actor=principal.subject, job=job)
        self._accepted.count(principal.subject, now=self.clock())
        found = recorded_jobs.find(self.ledger, job)
        assert found is not None
        self.runner.watch(found)
        return Accepted(job=found, is_new=True)

    def _check_intent(self, principal: Principal, request: Submission) -> None:
        """Require an intent of the same rights for the job's module if, and only if, the issuer is not our own.

        Raises:
            InvalidRequest: it is missing, or the request must not have one.
            Unauthenticated: it is not valid, or of another principal.
        """
        if self.issues_intents:
            if request.intent is not None:
                raise InvalidRequest("Leave out 'intent'. This installation creates the job's intent itself.")
            return
        if request.module == PIPELINE:
            raise InvalidRequest(
                "With an OIDC issuer, a pipeline cannot be submitted: each of its commands needs its own intent. Use a "
                "schedule with `identity.token_file: vault:…`."
            )
        if request.intent is None:
            raise InvalidRequest(
                "Give 'intent': a token of your issuer for the audience falaj-intent, with the claim entrypoint "
                f"'{request.module}'. It must be valid as long as the job runs."
            )
        intent = self.trust.intents.verify(request.intent, entrypoint=request.module)
        if principal_as_json(intent.principal) != principal_as_json(principal):
            raise Unauthenticated("The intent's subject, role, purpose, tenant or scope is not your token's.")

    def _limit_jobs(self, principal: Principal) -> None:
        limits, unfinished = self.rules.settings, self.runner.unfinished()
        mine = sum(job.submitter == principal.subject for job in unfinished)
        if mine >= limits.max_per_caller:
            raise TooManyJobs(
                f"You have {mine} unfinished jobs, and a caller may have {limits.max_per_caller} at a time. Wait for "
                "one, or stop one."
            )
        if len(unfinished) >= limits.max_unfinished:
            raise TooManyJobs(
                f"This installation runs at most {limits.max_unfinished} jobs at a time. Try again."
            )

    def _record_refusal(self, principal: Principal, module: str, error: JobForbidden) -> None:
        refused = JobRefused(
            submitter=principal.subject,
            role=principal.role.value,
            module=module if len(module) <= MAX_NAME and MODULE.fullmatch(module) else "",
            option=error.option,
            rule=error.rule,
        )
        self.ledger.append(refused, actor=principal.subject)


def covers(caller: Principal, owner: Principal) -> bool:
    """Return whether a token has all rights of a job, so that its caller may read what the job printed.

    A job without a purpose has no right that needs one.
    """
    return (
        (caller.tenant, caller.role) == (owner.tenant, owner.role)
        and owner.purpose in ("", caller.purpose)
        and (caller.models is None or (owner.models is not None and set(owner.models) <= set(caller.models)))
    )
