"""Forked processes for tests that kill processes or let them run in a race. A fork server imports the modules once."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext

_TARGETS = (
    "tests.projects.push",
    "tests.unit.cluster.ledger.test_ledger",
    "tests.unit.cluster.ledger.test_ledger_time",
    "tests.unit.cluster.ledger.test_version_numbers",
    "tests.unit.cluster.records.test_compaction_kills",
    "tests.unit.feature_jobs.offline.test_rebucketing",
    "tests.unit.feature_jobs.online.test_materialize_kill",
    "tests.unit.jobs.promotion.test_promotion_kills",
    "tests.unit.jobs.schedule.test_scheduler",
    "tests.unit.serve_apps.rollout.controller.test_bad_challengers",
    "tests.unit.serve_apps.rollout.controller.test_kills",
    "tests.unit.serve_apps.rollout.outage.test_kills",
)
"""Modules with the functions that run in such processes."""


def context() -> ForkServerContext:
    """Return the multiprocessing context of all these processes.

    There is one fork server per test run, so it preloads the modules of all collected tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in _TARGETS if name in sys.modules])
    return context
