"""Files that a stage writes: the earlier ones are moved aside while it runs, and restored if it fails.

So no other process takes a half-written file for a finished one. If the stage fails or its result does not meet a
requirement, its files are removed and the earlier ones are restored. All steps can be repeated after kill -9. Outputs
in an object store are not moved aside, because a store replaces a file in one request. After a failure they are
removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from cluster.storage import file_system, is_uri
from jobs.pipeline.graph import is_path


def set_aside(outputs: Iterable[str]) -> None:
    """Move the earlier outputs aside. If an attempt was killed, what it wrote is removed."""
    for path in _local(outputs):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_aside(path):
            _remove(path)
        elif path.exists():
            path.rename(_before(path))
        else:
            _absence(path).touch(mode=0o600)


def accept(outputs: Iterable[str]) -> None:
    """Remove what `set_aside` kept, because the new outputs replace it."""
    for path in _local(outputs):
        _remove(_before(path))
        _remove(_absence(path))


def discard(outputs: Iterable[str]) -> None:
    """Remove the outputs of a stage that failed, and restore the earlier ones."""
    paths = list(outputs)
    restore(paths)
    for uri in filter(is_uri, paths):
        fs, remote = file_system(uri)
        if fs.exists(remote):
            fs.rm(remote, recursive=True)


def restore(outputs: Iterable[str]) -> None:
    """Restore the earlier local outputs of a stage that failed. If no outputs were moved aside, nothing is changed."""
    for path in _local(outputs):
        if is_aside(path):
            _remove(path)
        if _before(path).exists():
            _before(path).rename(path)
        _remove(_absence(path))


def _local(outputs: Iterable[str]) -> list[Path]:
    return [Path(path) for path in outputs if is_path(path) and not is_uri(path)]


def is_aside(path: Path) -> bool:
    """Return whether `set_aside` was called for a path, and neither `accept` nor `discard` after it."""
    return _before(path).exists() or _absence(path).exists()


def _before(path: Path) -> Path:
    """Return where the earlier output is while the stage runs."""
    return path.with_name(f".{path.name}.before")


def _absence(path: Path) -> Path:
    """Return the file that marks that there was no earlier output."""
    return path.with_name(f".{path.name}.absent")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
