"""A map that HAProxy looks up: the file first, then entry by entry in the running workers.

In this order neither a crash nor a reload can undo a change, and the running map never gets ahead of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.storage import write_bytes
from serve_apps.edge.haproxy import HAProxy


class RunningMap:
    """One map file, and what is in the workers."""

    def __init__(self, haproxy: HAProxy, file: Path) -> None:
        self._haproxy = haproxy
        self._file = file
        self._entries: Mapping[str, str] | None = None

    def bring(self, entries: Mapping[str, str]) -> None:
        """Have these entries and no others, where they are not there already.

        Raises:
            OSError: the file could not be written, or a worker not told; nothing counts as done, so try again.
        """
        if entries == self._entries:
            return
        content = "".join(f"{key} {value}\n" for key, value in entries.items())
        write_bytes(str(self._file), content.encode())
        before = self._entries or {}
        if self._haproxy.pid is not None:
            for key, value in entries.items():
                if before.get(key) != value:
                    self._haproxy.set_map(self._file, key, value)
            for key in before.keys() - entries.keys():
                self._haproxy.del_map(self._file, key)
        self._entries = dict(entries)
