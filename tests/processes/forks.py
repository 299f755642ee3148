"""Processes that tests kill or let race: forked from one that has imported what they need once."""

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
    "tests.unit.feature_jobs.online.test_materialize_kill",
)
"""Modules whose functions such processes run."""


def context() -> ForkServerContext:
    """The context of them all; there is one server a test run, so it preloads for every test that was collected."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in _TARGETS if name in sys.modules])
    return context
