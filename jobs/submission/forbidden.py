"""The refusal of a job that no caller may submit. It becomes HTTP 403 and an event, unlike a mistake (400)."""

from __future__ import annotations

from cluster.errors import RefusedError


class Forbidden(RefusedError):
    """The request names a module, an option or a place that no job may have.

    Args:
        message: what is forbidden, and what to do. It never contains an option's value.
        rule: name of the rule, for the event.
        option: name of the option, or "".
    """

    def __init__(self, message: str, *, rule: str, option: str = "") -> None:
        super().__init__(message)
        self.rule = rule
        self.option = option
