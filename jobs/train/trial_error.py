"""The error of a trial, without values of rows.

Tune and Ray write the errors of a trial into files that are not encrypted, and the sweep prints them. A message of
Falaj's own errors has no value of a row. Any other message may have one, for example that of an error in a family's
code. So such an error is replaced by its type and the line of code that raised it.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from cluster.errors import RefusedError, TrainingFailed, refusal_behind


class TrialFailed(TrainingFailed):
    """The code of a trial raised an error. Another try would raise it again.

    Args:
        reason: Type of the error.
        place: Function and line that raised it.
    """

    def __init__(self, reason: str, place: str) -> None:
        super().__init__(reason, place)  # so that it can be pickled
        self.reason, self.place = reason, place

    def __str__(self) -> str:
        return (
            f"{self.reason} in {self.place}. Its message may have values of rows, so it is not shown; `jobs.train` "
            "with these parameters shows it."
        )


def without_values(error: Exception) -> Exception:
    """Return an error that may be printed and stored, and that says what happened.

    Args:
        error: The error of a trial.
    """
    cause = refusal_behind(error)
    if isinstance(cause, RefusedError | TrainingFailed):
        return cause.with_traceback(None)
    return TrialFailed(type(error).__name__, _place(error))


def _place(error: Exception) -> str:
    """Return function, file and line of the frame that raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    last = frames[-1]
    return f"{last.name}, {Path(last.filename).name} line {last.lineno}"
