"""Which files and URIs the options of a job may name.

A job runs as the cluster's user, so its paths reach what this user reaches: keys, other users' folders that are open to
it, credentials. No option's type says that it is a path. So every text of every option is checked as if it were one. A
text without a slash is a path in the project folder, and is allowed.

Allowed are the project folder, the folder `jobs/` below the storage root, and what the operator names
(`jobs.allowed_paths`). Always refused are the rest of the storage root, hidden files, and files with code or
configuration, because Python or Hydra could load them later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from cluster.session import ClusterRecord
from cluster.storage import is_uri
from jobs.submission.errors import JobForbidden

JOBS_FOLDER = "jobs"
"""Folder below the storage root that options of a job may name."""
CODE = frozenset(
    {".py", ".pyc", ".pyi", ".pth", ".so", ".sh", ".cedar"}
    | {".yaml", ".yml", ".toml", ".cfg", ".ini", ".pem", ".key", ".jwt", ".db", ".lock"}
)
"""Suffixes of code, configuration, keys and locks."""
_CODE = "names a file with code, configuration or a key, or a pattern that could find one"
_GLOB = re.compile(r"[*?\[]")
_FILE = "file://"
_STORAGE = "{storage}"
"""A source's path may have this text. The command replaces it by the storage root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PathRules:
    """The rules of one installation."""

    project: str
    """Absolute path of the project folder."""
    roots: tuple[str, ...]
    """Storage root, and this machine's own folder of state: absolute paths or URIs."""
    allowed: tuple[str, ...] = ()
    """Further folders and URIs."""

    @classmethod
    def of(cls, record: ClusterRecord, allowed: Sequence[str]) -> PathRules:
        """Return the rules of the running cluster."""
        project = record.project_root
        return cls(
            project=os.path.realpath(project),
            roots=tuple(
                dict.fromkeys(_real(root, project) for root in (record.storage_root, record.layout.disk))
            ),
            allowed=tuple(_real(path, project) for path in allowed),
        )

    def check(self, text: str, *, option: str) -> None:
        """Require that an option may have this text.

        Raises:
            JobForbidden: as a path, it is outside the allowed places.
        """
        reason = self._uri_problem(text) if _is_remote(text) else self._path_problem(text)
        if _STORAGE in text:
            reason = f"has the placeholder `{_STORAGE}`"
        if reason:
            raise JobForbidden(
                f"Option '{option}' {reason}. A job reads and writes data in the project folder, in `jobs/` below the "
                "storage root, and in places that the operator named with `cluster.up jobs.allowed_paths=[…]`.",
                rule="path",
                option=option,
            )

    def _uri_problem(self, text: str) -> str:
        path = text.partition("://")[2].removesuffix("/")
        if "::" in text or not {"", ".", ".."}.isdisjoint(path.split("/")):
            return "is a URI with `::`, `//`, `.` or `..`"
        pattern = _GLOB.search(text)
        if _may_find_code(path):
            return _CODE
        for root in self.roots:
            if _is_below(text, root):
                return "" if _is_in_jobs_folder(text, root) else "names the platform's own state"
            # A folder is read with all that is below it, and so is what a pattern finds.
            if _is_below(root, text.rstrip("/")) or (pattern and root.startswith(text[: pattern.start()])):
                return "names a folder with the platform's own state"
        return (
            "" if any(_is_below(text, place) for place in self.allowed) else "names a URI that is not allowed"
        )

    def _path_problem(self, text: str) -> str:
        text = text.removeprefix(_FILE)
        if not text:
            return "is empty (`null` means no value)"
        if Path(text).parts[:1] and Path(text).parts[0].startswith(
            "~"
        ):  # `./~` is one too, as in `storage.resolve`
            return "names a home folder"
        pattern = _GLOB.search(text)
        if pattern is None:
            return self._problem(os.path.join(self.project, text))
        if ".." in text.split("/"):
            return "is a pattern with `..`"
        if _may_find_code(text):
            return _CODE
        folder, last = text[: pattern.start()].rpartition("/")[0], text.rpartition("/")[2]
        place = os.path.join(self.project, folder or ("/" if text.startswith("/") else ""))
        if "**" in text or _GLOB.search(text.removesuffix(last)):  # it can find all files below this folder
            return self._problem(os.path.join(place, "x"), below=place)
        if any(
            os.path.realpath(place) == os.path.dirname(root) and fnmatch(os.path.basename(root), last)
            for root in self.roots
        ):
            return "is a pattern that finds the platform's own state"
        return self._problem(os.path.join(place, last))

    def _problem(self, path: str, *, below: str | None = None) -> str:
        """Return what is wrong with a path, or "". With `below`, all that is below this folder is meant."""
        real = os.path.realpath(path)
        folder = real if below is None else os.path.realpath(below)
        for root in self.roots:
            if is_uri(root):
                continue
            if _is_below(real, root):
                return "" if _is_in_jobs_folder(real, root) else "names the platform's own state"
            if _is_below(root, folder):
                return "names a folder with the platform's own state"
        if PurePosixPath(real).suffix.lower() in CODE:
            return _CODE
        if real == self.project:
            return "names the whole project folder"
        if _is_below(real, self.project):
            parts = Path(real).relative_to(self.project).parts
            return "names a hidden file" if any(part.startswith(".") for part in parts) else ""
        return (
            ""
            if any(_is_below(real, place) for place in self.allowed)
            else "names a path outside these places"
        )


def _may_find_code(pattern: str) -> bool:
    """Return whether a pattern could find hidden files, or files with code, configuration or a key."""
    last = pattern.rpartition("/")[2].lower()
    signs, tail = set(_GLOB.findall(last)), re.split(r"[*?\[\]]", last)[-1]
    if not signs:
        return PurePosixPath(last).suffix in CODE
    if _GLOB.match(last) and "." not in tail:
        return True
    if signs == {"?"}:  # also the end of a question in a plain text
        return any(fnmatch(suffix, last[-len(suffix) :]) for suffix in CODE)
    return any(tail.endswith(suffix) or suffix.endswith(tail) for suffix in CODE)


def _is_remote(text: str) -> bool:
    return "://" in text and not (text.startswith(_FILE) and "::" not in text)


def _real(path: str, project: str) -> str:
    if is_uri(path):
        return path.rstrip("/")
    return os.path.realpath(os.path.join(project, path.removeprefix(_FILE)))


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _is_in_jobs_folder(path: str, root: str) -> bool:
    return path.removeprefix(root).strip("/").split("/")[0] == JOBS_FOLDER
