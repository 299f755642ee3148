"""Write the files of a new project into a folder, and nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import ConfigError
from cluster.new_project.machines import machine_tables

_STORED_AS = {"gitignore": ".gitignore"}
"""Name of a file in this package, and in the project. Git would obey a `.gitignore` in this repository."""


def write_project(folder: str) -> int:
    """Write a project, and return its number of files. If that fails, remove what was written.

    Args:
        folder: A new or an empty folder.

    Raises:
        ConfigError: The name is unusable, the folder is not empty, or it cannot be written.
    """
    if not folder or not os.path.abspath(folder).isprintable():
        raise ConfigError(f"{folder!r} is no usable name of a folder. Use letters, digits, '-' and '_'.")
    root, made = Path(folder), list[Path]()
    try:
        _make_folder(root, made)
        existing = next(root.iterdir(), None)
        if existing is not None:
            raise ConfigError(
                f"{folder} is not empty; it has {existing.name!r}. Name a new or an empty folder, because no file is "
                "overwritten."
            )
        for name, content in _project_files():
            path = root / name
            _make_folder(path.parent, made)
            with path.open("xb") as file:  # `x` refuses a file that exists
                made.append(path)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        _remove(made)
        raise ConfigError(f"{folder} cannot be written: {error.strerror}. Nothing was changed.") from error
    return sum(path.is_file() for path in made)


def _make_folder(folder: Path, made: list[Path]) -> None:
    """Create a folder and its missing parents, and add them to `made`, parents first."""
    if folder.is_dir():
        return
    _make_folder(folder.parent, made)
    folder.mkdir()
    made.append(folder)


def _remove(made: list[Path]) -> None:
    for path in reversed(made):
        with contextlib.suppress(OSError):  # another process may have written into a folder
            path.rmdir() if path.is_dir() else path.unlink()


def _project_files() -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield path and content of each file of a project."""
    yield from _skeleton(files("cluster.new_project").joinpath("skeleton"), PurePosixPath())
    readings, failures = machine_tables()
    for name, table in (("readings", readings), ("failures", failures)):
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        yield PurePosixPath("data", f"{name}.parquet"), buffer.getvalue().to_pybytes()


def _skeleton(folder: Traversable, path: PurePosixPath) -> Iterator[tuple[PurePosixPath, bytes]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _skeleton(entry, path / entry.name)
        elif entry.is_file():
            yield path / _STORED_AS.get(entry.name, entry.name), entry.read_bytes()
