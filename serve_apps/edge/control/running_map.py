"""A map that HAProxy looks up: updated in the running workers first, then in the file that the next worker reads.

The workers are updated first, because renaming a file can take a third of a second on a busy disk, and fails on a full
disk. During a reload, the new worker may have read the old file, and does not get commands yet. So the new worker gets
the changes after the reload. If a controller is killed between the two steps, the next controller reads the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from serve_apps.edge.control.files import replace_file
from serve_apps.edge.control.haproxy_process import HAProxy


class RunningMap:
    """One map file, and the same map in the workers."""

    def __init__(self, haproxy: HAProxy, file: Path) -> None:
        self._haproxy = haproxy
        self._file = file
        self._entries: dict[str, str] | None = None
        self._changed: set[str] = set()

    def update(self, entries: Mapping[str, str]) -> None:
        """Replace all entries of the map, if they differ from `entries`.

        Raises:
            OSError: a worker could not be updated, or the file could not be written. Call this again with all entries.
        """
        if entries == self._entries:
            return
        previous = self._entries or {}
        changed = {key for key in previous.keys() | entries.keys() if previous.get(key) != entries.get(key)}
        self._changed |= changed
        self._send(entries, changed)
        content = "".join(f"{key} {value}\n" for key, value in entries.items())
        replace_file(self._file, content.encode())
        self._entries = dict(entries)

    def track_changes(self) -> None:
        """Record all later changes. Call this when a reload begins."""
        self._changed.clear()

    def resend_changes(self) -> None:
        """Send the new worker the changes since `track_changes`. Call this when the reload is done.

        Raises:
            OSError: a worker could not be updated. Call this again.
        """
        self._send(self._entries or {}, self._changed)

    def _send(self, entries: Mapping[str, str], keys: set[str]) -> None:
        if self._haproxy.pid is None:
            return
        for key in sorted(keys):
            if (value := entries.get(key)) is None:
                self._haproxy.del_map(self._file, key)
            else:
                self._haproxy.set_map(self._file, key, value)
