"""The errors of requests about submitted jobs. `http.py` gives each of them a status."""

from __future__ import annotations

from cluster.errors import FalajError, RefusedError


class JobForbidden(RefusedError):
    """No caller may submit this job: HTTP 403 and an event. `AccessDenied` is about one caller's rights.

    Args:
        message: what is forbidden, and what to do. It never contains an option's value.
        rule: name of the rule, for the event.
        option: name of the option, or "".
    """

    def __init__(self, message: str, *, rule: str, option: str = "") -> None:
        super().__init__(message)
        self.rule = rule
        self.option = option


class JobNotFound(FalajError):
    """No job has this id: HTTP 404."""


class KeyTaken(FalajError):
    """The client key belongs to a job with other content: HTTP 409."""


class TooManyJobs(FalajError):
    """A limit of jobs, of followed logs or of refused requests is reached: HTTP 429."""
