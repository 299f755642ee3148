"""What callers do with jobs: submit, list, show and stop them. Every request needs a valid token."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import InvalidRequest, RefusedError, Unauthenticated
from cluster.host.submission import MODULE
from cluster.ledger import Ledger
from cluster.ledger.events import JobRefused, JobStopped
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Action, Policy, Resource
from cluster.security.tokens.intent import write_intent
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.trust import Trust
from jobs.principal_tokens import principal_as_json
from jobs.submission import submitted
from jobs.submission.errors import JobForbidden, JobNotFound, KeyTaken, TooManyJobs
from jobs.submission.modules import MAX_NAME, PIPELINE
from jobs.submission.overrides import JobRules
from jobs.submission.runner import JobRunner, intent_name
from jobs.submission.submitted import Job, JobState

MAX_KEY = 200
MAX_LISTED = 200
MAX_REFUSED = 30
"""Most refused requests of a caller in `REFUSED_S`. Further requests get 429. So nobody can fill the ledger with events
or keep the service busy."""
REFUSED_S = 60.0
MAX_NEW = 60
"""Most new jobs of a caller in `REFUSED_S`. Further requests get 429. Each job has up to four events, also if it is
stopped at once."""
NEW, ALL = "new", "*"
"""Names, in the policies, of a job that does not exist yet, and of all jobs."""
_FIELDS = frozenset({"module", "overrides", "key", "intent"})
_BEARER = "bearer "


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A valid request to submit a job."""

    module: str
    overrides: list[str]
    key: str | None = None
    intent: str | None = field(default=None, repr=False)
    """The caller's intent; only with an OIDC issuer, because the platform cannot create intents then."""


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
    _refused_at: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    """Times of the last refused requests of each subject."""
    _accepted_at: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    """Times of the last new jobs of each subject."""

    def authenticate(self, authorization: str | None) -> Principal:
        """Return the principal of an Authorization header.

        Raises:
            Unauthenticated: the token is missing or not valid.
        """
        try:
            if authorization is None or not authorization.lower().startswith(_BEARER):
                raise Unauthenticated("Give a token: 'Authorization: Bearer ...'.")
            return self.trust.tokens.verify(authorization[len(_BEARER) :].strip())
        except Unauthenticated as error:
            self.decisions.count_unauthenticated(str(error), at=self.clock())
            raise

    def submit(self, principal: Principal, body: object) -> Accepted:
        """Accept a job, or return the job that this caller has submitted with the same key.

        Raises:
            AccessDenied: the caller may not submit jobs.
            JobForbidden: no caller may submit this job. An event records it.
            InvalidRequest, ConfigError: the request is wrong.
            KeyTaken, TooManyJobs: see there.
        """
        self._check(principal, Action.submit_jobs, self._resource(NEW, submitter=principal.subject))
        self._limit_frequency(principal)
        try:
            request = self._validate(principal, body)
        except RefusedError:
            with self._lock:
                self._refused_at[principal.subject].append(self.clock())
            raise
        with self._lock:
            return self._accept(principal, request)

    def jobs(self, principal: Principal, *, count: int) -> list[tuple[Job, JobState]]:
        """Return the newest jobs that the caller may see: an admin or auditor sees all, others see their own.

        Raises:
            AccessDenied: the caller may see none.
        """
        all_jobs = self._resource(ALL, submitter="")
        sees_all = self.policy.decide(
            principal, Action.read_jobs, all_jobs, environment=self.environment
        ).allowed
        if not sees_all:
            self._check(principal, Action.read_jobs, self._resource(ALL, submitter=principal.subject))
        submitter = None if sees_all else principal.subject
        found = submitted.newest_jobs(self.ledger, submitter=submitter, count=min(count, MAX_LISTED))
        return [(job, submitted.state_of(self.ledger, job.id)) for job in found]

    def job(self, principal: Principal, job: str, *, action: Action = Action.read_jobs) -> Job:
        """Return a job.

        Raises:
            JobNotFound: there is no such job.
            AccessDenied: the caller may not do the action with this job.
        """
        found = submitted.find(self.ledger, job)
        if found is None:
            self._check(principal, action, self._resource(ALL, submitter=principal.subject))
            raise JobNotFound(f"No job '{job}'.")
        submitter = found.principal
        self._check(
            principal,
            action,
            self._resource(job, submitter=submitter.subject, tenant=submitter.tenant),
        )
        return found

    def state(self, job: str) -> JobState:
        """Return how far a job has come."""
        return submitted.state_of(self.ledger, job)

    def stop(self, principal: Principal, job: str) -> JobState:
        """Stop a job; if it is over, change nothing. Return its state.

        Raises:
            JobNotFound: there is no such job.
            AccessDenied: the caller is neither its submitter nor an admin.
        """
        found = self.job(principal, job, action=Action.control_jobs)
        if not submitted.state_of(self.ledger, job).is_over:
            stopped = JobStopped(job=job, subject=principal.subject)
            self.ledger.append_once(stopped, actor=principal.subject, job=job)
            self.runner.watch(found)
        return submitted.state_of(self.ledger, job)

    def _resource(self, name: str, *, submitter: str, tenant: str = "default") -> Resource:
        """Return a job, or all jobs of a submitter, as the target of an action."""
        return Resource(kind="job", name=name, registered_by=submitter, tenant=tenant, region=self.region)

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
        decision = self.policy.decide(principal, action, resource, environment=self.environment)
        self.decisions.record_decision(principal, action, resource, decision, at=self.clock())
        if not decision.allowed:
            self.policy.check(principal, action, resource, environment=self.environment)

    def _accept(self, principal: Principal, request: Submission) -> Accepted:
        job = submitted.new_id(principal, request.key)
        content = submitted.content_hash(principal, request.module, request.overrides)
        existing = None if request.key is None else submitted.find(self.ledger, job)
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
        event = submitted.submitted_event(
            job, principal, request.module, request.overrides, config_dir=self.rules.settings.config_dir
        )
        self.ledger.append_once(event, actor=principal.subject, job=job)
        self._accepted_at[principal.subject].append(self.clock())
        found = submitted.find(self.ledger, job)
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

    def _limit_frequency(self, principal: Principal) -> None:
        counts = (
            ("refused requests", self._refused_at, MAX_REFUSED),
            ("new jobs", self._accepted_at, MAX_NEW),
        )
        with self._lock:
            for of_what, times, limit in counts:
                recent, now = times[principal.subject], self.clock()
                while recent and not now - REFUSED_S <= recent[0] <= now:  # later: the clock was set back
                    recent.popleft()
                if len(recent) >= limit:
                    raise TooManyJobs(f"{limit} {of_what} in {REFUSED_S:.0f} s. Try again later.")
                if not recent:
                    del times[principal.subject]

    def _record_refusal(self, principal: Principal, module: str, error: JobForbidden) -> None:
        refused = JobRefused(
            submitter=principal.subject,
            role=principal.role.value,
            module=module if len(module) <= MAX_NAME and MODULE.fullmatch(module) else "",
            option=error.option,
            rule=error.rule,
        )
        self.ledger.append(refused, actor=principal.subject)


def parse(body: object) -> Submission:
    """Return the submission in a JSON body.

    Raises:
        InvalidRequest: the body has another form.
    """
    if not isinstance(body, dict) or not body.keys() <= _FIELDS:
        raise InvalidRequest("A job is an object with 'module', and perhaps 'overrides' and 'key'.")
    module, overrides, key = body.get("module"), body.get("overrides", []), body.get("key")
    if not isinstance(module, str) or not module:
        raise InvalidRequest("'module' must name the command, such as 'feature_jobs.ingest'.")
    if not isinstance(overrides, list) or not all(isinstance(each, str) for each in overrides):
        raise InvalidRequest("'overrides' must be a list of texts, such as ['view=income'].")
    if key is not None and not (isinstance(key, str) and 0 < len(key) <= MAX_KEY and key.isprintable()):
        raise InvalidRequest(f"'key' must be printable text of at most {MAX_KEY} characters.")
    intent = body.get("intent")
    if intent is not None and not isinstance(intent, str):
        raise InvalidRequest("'intent' must be a token.")
    return Submission(module=module, overrides=list(overrides), key=key, intent=intent)


def as_json(job: Job, state: JobState) -> dict[str, Any]:
    """Return a job as JSON."""
    ended = {"exit_code": state.exit_code, "seconds": state.seconds, "reason": state.reason}
    return {
        "id": job.id,
        "status": state.status,
        "module": job.module,
        "overrides": list(job.overrides),
        "submitter": job.submitter,
        "role": job.principal.role.value,
        "submitted_at": job.submitted_at.isoformat(),
        **(ended if state.is_over else {}),
    }
