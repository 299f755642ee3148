"""A map that HAProxy looks up: entry by entry in the running workers, then as the file that the next worker reads.

The workers come first, because a file's rename can wait a third of a second for a busy disk, and fails on a full one. A
worker that a reload is just starting may have read the file before, and not be there yet to be told: it is told again.
A controller that is killed between the two is followed by one that reads the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from serve_apps.edge.control.files import replace_file
from serve_apps.edge.control.haproxy_process import HAProxy


class RunningMap:
    """One map file, and what is in the workers."""

    def __init__(self, haproxy: HAProxy, file: Path) -> None:
        self._haproxy = haproxy
        self._file = file
        self._entries: dict[str, str] | None = None
        self._changed: set[str] = set()

    def bring(self, entries: Mapping[str, str]) -> None:
        """Have these entries and no others, where they are not there already.

        Raises:
            OSError: a worker could not be told, or the file not written; nothing counts as done, so try again.
        """
        if entries == self._entries:
            return
        before = self._entries or {}
        changed = {key for key in before.keys() | entries.keys() if before.get(key) != entries.get(key)}
        self._changed |= changed
        self._tell(entries, changed)
        content = "".join(f"{key} {value}\n" for key, value in entries.items())
        replace_file(self._file, content.encode())
        self._entries = dict(entries)

    def note_changes(self) -> None:
        """A reload begins: keep in mind what changes from now on."""
        self._changed.clear()

    def tell_again(self) -> None:
        """A reload is done: tell the new worker what has changed meanwhile.

        Raises:
            OSError: a worker could not be told; try again.
        """
        self._tell(self._entries or {}, self._changed)

    def _tell(self, entries: Mapping[str, str], keys: set[str]) -> None:
        if self._haproxy.pid is None:
            return
        for key in sorted(keys):
            if (value := entries.get(key)) is None:
                self._haproxy.del_map(self._file, key)
            else:
                self._haproxy.set_map(self._file, key, value)
