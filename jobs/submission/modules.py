"""Which modules a job may run, and which modules its options may name.

A module is code, so only the platform's own commands and modules that the operator named (`jobs.allowed_modules`) may
run. The commands are those that check their caller's rights themselves: they call `create_actor`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.entrypoint import PACKAGES
from cluster.errors import did_you_mean
from cluster.host.submission import MODULE, WITH_SUBMODULES
from jobs.pipeline.stage.commands import STAGE_COMMANDS
from jobs.submission.errors import JobForbidden

PIPELINE = "jobs.pipeline"
"""It starts other commands as jobs, and gives them its own token."""
_ACT_FOR_OTHERS = {
    "cluster.records.nodes",
    "feature_jobs.census.source",
    "jobs.pipeline.outcomes",
    "jobs.pipeline.traffic",
}
"""Stages that check no rights of their caller, or create a token of another principal."""
_NO_STAGES = {
    PIPELINE,
    "feature_jobs.rebucket",
    "feature_jobs.retire",
    "feature_jobs.skew",
    "feature_jobs.stream",
}
COMMANDS = frozenset((set(STAGE_COMMANDS) - _ACT_FOR_OTHERS) | _NO_STAGES)
"""The platform's commands that a job may run. Left out are those that show rows (`quarantine`), change keys, schedules,
limits or the cluster, or act for another principal."""
MAX_NAME = 200


def require_command(module: str, allowed: Sequence[str]) -> None:
    """Require that a job may run a module.

    Raises:
        JobForbidden: it may not.
    """
    if module in COMMANDS or _is_named(module, allowed):
        return
    hint = did_you_mean(module, sorted(COMMANDS)) if MODULE.fullmatch(module) else ""
    raise JobForbidden(
        f"No job may run this module.{hint} The operator allows the installation's own modules with "
        "`cluster.up jobs.allowed_modules=[…]`.",
        rule="module",
    )


def require_library(module: str, allowed: Sequence[str], *, option: str) -> None:
    """Require that an option may name a module, such as definitions or a model family.

    Raises:
        JobForbidden: it may not.
    """
    is_ours = module.partition(".")[0] in PACKAGES and len(module) <= MAX_NAME
    if (is_ours and MODULE.fullmatch(module)) or _is_named(module, allowed):
        return
    raise JobForbidden(
        f"Option '{option}' names a module that no job may load. The operator allows the installation's own modules "
        "with `cluster.up jobs.allowed_modules=[…]`.",
        rule="module of an option",
        option=option,
    )


def _is_named(module: str, allowed: Sequence[str]) -> bool:
    if len(module) > MAX_NAME or not MODULE.fullmatch(module) or module.partition(".")[0] in PACKAGES:
        return False
    return any(
        module == name.removesuffix(WITH_SUBMODULES)
        or (name.endswith(WITH_SUBMODULES) and module.startswith(name.removesuffix("*")))
        for name in allowed
    )
