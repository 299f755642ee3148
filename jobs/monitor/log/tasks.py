"""Count the records of files of a log's table in Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from cluster.records.table import LogFile
from cluster.security.keys.access import KeyAccess
from jobs.monitor.log.index import COLUMNS, count_records
from jobs.monitor.log.units import Index, index_table, read_units

FILES_PER_TASK = 4


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
    tasks = [
        count_task.options(**where).remote(root, files[start : start + FILES_PER_TASK], access)
        for start in range(0, len(files), FILES_PER_TASK)
    ]

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
