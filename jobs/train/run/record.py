"""Record a run in the ledger: its start, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.errors import RefusedError, TrainingFailed
from cluster.ledger import Ledger
from jobs.train.run.identity import (
    RunClaimed,
    check_settings,
    find_finished,
    record_failed,
    record_finished,
    record_started,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of a training job."""

    ledger: Ledger
    model: str
    run: str
    """Id of the run."""
    family: str
    settings: Mapping[str, Any]
    """Everything that determines the model, see `run_settings`."""
    actor: str
    """Name of the caller."""

    def finished_version(self) -> int | None:
        """Return the version that the run has registered, or None if it is not finished.

        A run that was killed after it had registered its version is recorded as finished.
        """
        result = find_finished(self.ledger, model=self.model, run=self.run)
        if result is None:
            return None
        record_finished(self.ledger, model=self.model, run=self.run, result=result, actor=self.actor)
        return result.version

    @contextmanager
    def recorded(self, *, is_continued: bool) -> Iterator[None]:
        """Record the start of the run, and after the block that it finished or failed. The block registers a version.

        If another job has the run, that job records its end, and this one records nothing.

        Args:
            is_continued: Whether the run was started before.
        """
        record_started(
            self.ledger,
            model=self.model,
            run=self.run,
            family=self.family,
            settings=self.settings,
            actor=self.actor,
        )
        print(f"run {self.run} {'continues' if is_continued else 'starts'}", flush=True)
        try:
            yield
        except RunClaimed:
            raise
        except (RefusedError, TrainingFailed) as error:
            reason = type(error).__name__
            record_failed(self.ledger, model=self.model, run=self.run, reason=reason, actor=self.actor)
            raise
        version = self.finished_version()
        assert version is not None

    def check_settings(self) -> bool:
        """Return whether the run was started before.

        Raises:
            ConfigError: The run was started with other settings or other data.
        """
        return check_settings(self.ledger, model=self.model, run=self.run, settings=self.settings)
