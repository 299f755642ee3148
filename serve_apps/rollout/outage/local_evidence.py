"""What one machine can see of a rollout without any database: the last requests in its edge's own access files.

It is enough for the breaker, which needs no statistics. Nothing is stored. The first pass reads the end of the newest
files, and each later pass reads what was written since.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan
from serve_apps.rollout.evidence.access_files import list_files
from serve_apps.rollout.evidence.access_records import BrokenRecord, Request, parse
from serve_apps.rollout.evidence.activity import Activity, last_requests
from serve_apps.rollout.evidence.store import current_window

MAX_BYTES = 4 * 2**20
"""Bytes of one pass. If more was written since the last one, only the end is read: the breaker needs the newest."""
NUM_FILES = 2
"""How many of the newest files are read: a rotation begins another one."""


class LocalEvidence:
    """The last requests of each rollout at this machine's edge.

    Args:
        folder: The edge's access files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._positions: dict[str, int] = {}
        self._activities: dict[str, Activity] = {}

    def read(self) -> None:
        """Read the new records.

        Raises:
            OSError: A file cannot be read.
        """
        paths = list_files(self._folder)[-NUM_FILES:]
        requests = [request for path in paths for request in self._new_requests(path)]
        for request in sorted(requests, key=lambda one: one.ended_ms):
            self._activities.setdefault(request.rollout, Activity()).add(request)
        self._positions = {path.name: self._positions[path.name] for path in paths}

    def evidence(
        self,
        rollout_id: str,
        plan: Plan,
        *,
        step: int,
        step_started_at: dt.datetime,
        started_at: dt.datetime,
        now: dt.datetime,
    ) -> Evidence:
        """Return the last requests of a rollout. There are no other counts."""
        window = current_window(
            plan, step=step, step_started_at=step_started_at, started_at=started_at, now=now
        )
        activity = self._activities.get(rollout_id, Activity())
        return Evidence(
            step=step,
            window=window.number,
            step_s=(now - step_started_at).total_seconds(),
            total_s=(now - started_at).total_seconds(),
            last=last_requests([activity]),
        )

    def forget(self) -> None:
        """Forget all requests. The next pass reads the end of the files again."""
        self._positions, self._activities = {}, {}

    def _new_requests(self, path: Path) -> list[Request]:
        known = self._positions.get(path.name, 0)
        with path.open("rb") as file:
            start = max(known, file.seek(0, 2) - MAX_BYTES)
            file.seek(start)
            content = file.read(MAX_BYTES)
        lines = content[: content.rfind(b"\n") + 1]
        self._positions[path.name] = start + len(lines)
        found = []
        for line in lines.splitlines():
            try:  # the first line may be the end of a record
                request = parse(line)
            except BrokenRecord:
                continue
            if request is not None:
                found.append(request)
        return found
