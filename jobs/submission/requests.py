"""The body of a request to submit a job, and a job as an answer has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InvalidRequest
from jobs.submission.recorded_jobs import Job, JobState

MAX_KEY = 200
_FIELDS = frozenset({"module", "overrides", "key", "intent"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A valid request to submit a job."""

    module: str
    overrides: list[str]
    key: str | None = None
    intent: str | None = field(default=None, repr=False)
    """The caller's intent; only with an OIDC issuer, because the platform cannot create intents then."""


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
