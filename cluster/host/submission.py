"""Settings of submitted jobs (`POST /v1/jobs`): what they may run, and what they may reach on this machine.

Only the operator sets them, with `cluster.up`. A caller's request cannot change them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MODULE = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")
"""Pattern of a module's name. A private module, whose name starts with `_`, does not match."""
WITH_SUBMODULES = ".*"


@dataclass(kw_only=True, slots=True)
class SubmissionConfig:
    """Configuration of submitted jobs."""

    allowed_modules: list[str] = field(default_factory=list)
    """The installation's own modules that a job may run, or name as definitions or model family. `shop.*` allows `shop`
    and all modules in it."""
    allowed_paths: list[str] = field(default_factory=list)
    """Folders and URIs that options of a job may name, besides the project folder."""
    config_dir: str | None = None
    """The installation's folder of configurations, for example with its pipelines."""
    max_running: int = 4
    """Largest number of jobs that run at the same time. The others wait, at most for an hour."""
    max_per_caller: int = 4
    """Largest number of unfinished jobs of one caller."""
    max_unfinished: int = 32
    """Largest number of unfinished jobs of all callers."""

    def __post_init__(self) -> None:
        for name in self.allowed_modules:
            if not MODULE.fullmatch(name.removesuffix(WITH_SUBMODULES)):
                raise ValueError(
                    f"jobs.allowed_modules must be names of public modules, or `name.*`, got '{name}'."
                )
        if not all(self.allowed_paths):
            raise ValueError("jobs.allowed_paths has an empty path. Name folders or URIs.")
        for limit in ("max_running", "max_per_caller", "max_unfinished"):
            if getattr(self, limit) < 1:
                raise ValueError(f"jobs.{limit} must be at least 1, got {getattr(self, limit)}.")
