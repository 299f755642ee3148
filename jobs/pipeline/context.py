"""What a run of a pipeline needs from its surroundings, and its running stages."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import FalajError, RefusedError
from cluster.ledger import Ledger
from jobs.pipeline.keys import Prepared
from jobs.pipeline.stage.content import Platform
from jobs.pipeline.stage.ray_jobs import Jobs


class StageFailed(FalajError):
    """A stage's command failed."""


class RunCancelled(RefusedError):
    """The run was cancelled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """What a run needs from its surroundings."""

    ledger: Ledger
    actor: str
    platform: Platform
    jobs: Jobs
    folder: Path
    """Folder for the results of stages."""
    options: tuple[str, ...] = ()
    """Arguments of the pipeline's command line that are passed on to each command."""
    config_dir: str | None = None
    print_line: Callable[[str], None] = lambda text: print(text, flush=True)
    sleep: Callable[[float], None] = time.sleep


@dataclass(kw_only=True, slots=True)
class Attempt:
    """A stage that is running."""

    prepared: Prepared
    job: str
    started_at: str
    log_shown_at: float
    """When its log was last shown."""


class EarlierStage(NamedTuple):
    """A stage, or a group of stages, that was done before the ledger recorded pipelines."""

    seconds: float
    result: dict[str, Any]
