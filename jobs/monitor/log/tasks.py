"""Count the records of files of a log's table in Ray tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from cluster.records.table import LogFile
from cluster.security.keys.access import KeyAccess
from jobs.monitor.log.index import COLUMNS, count_records
from jobs.monitor.log.units import Index, index_table, read_units


def max_tasks() -> int:
    """Return how many tasks run at the same time: one for each core.

    A cluster has more CPUs than cores by default. Each worker imports large libraries first, so more workers than cores
    would only take time and memory.
    """
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    return max(1, min(cpus, max(1, nodes) * (os.cpu_count() or 1)))


def start_counting(
    root: str, files: Sequence[LogFile], access: KeyAccess, where: Mapping[str, Any]
) -> Callable[[], Index]:
    """Start tasks that count files of a prediction log's table. Return a function that waits for their counts.

    Args:
        root: Folder or URI of the log.
        files: The files.
        access: Access to the log's keys.
        where: Options of the tasks.
    """
    limit = max_tasks()
    slices = [files[first::limit] for first in range(min(limit, len(files)))]
    tasks = [count_task.options(**where).remote(root, one, access) for one in slices]

    def wait() -> Index:
        return {path: unit for result in ray.get(tasks) for path, unit in result.items()}

    return wait


def count_files(root: str, files: Sequence[LogFile], access: KeyAccess) -> Index:
    """Return the counts of some files."""
    return {
        path: index_table(table, -1, count_records)
        for path, table in read_units(root, files, access, COLUMNS)
    }


count_task = ray.remote(count_files)
