"""Find the source of modules without importing them, because an import runs code."""

from __future__ import annotations

import ast
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from cluster.entrypoint import PACKAGES

_INSTALLED = ("site-packages", "dist-packages")
_STANDARD_LIBRARY = Path(ast.__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class TopLevel:
    """A package or module without a parent."""

    file: Path | None
    """Its source; None for a folder without `__init__.py`."""
    folders: tuple[Path, ...]
    """Folders with its submodules."""

    @property
    def is_library(self) -> bool:
        """Whether it belongs to the standard library or to an installed package."""
        path = self.file or next(iter(self.folders), None)
        if path is None:
            return True
        return any(part in _INSTALLED for part in path.parts) or path.is_relative_to(_STANDARD_LIBRARY)


class Modules:
    """Finds modules on the import path."""

    def __init__(self) -> None:
        self._top_level = functools.cache(_top_level)

    def own_file(self, module: str) -> Path | None:
        """Return the file of a module, or None if it is of a library, or has no source."""
        return None if self.is_library(module) else self.file(module)

    def is_library(self, module: str) -> bool:
        """Return whether a module is of the standard library or of an installed package, and not one of Falaj's."""
        top = module.partition(".")[0]
        found = self._top_level(top)
        return found is not None and found.is_library and top not in PACKAGES

    def file(self, module: str) -> Path | None:
        """Return the source of a module or package, or None if it has none."""
        top, *rest = module.split(".")
        found = self._top_level(top)
        if found is None or not rest:
            return None if found is None else found.file
        stems = [folder.joinpath(*rest) for folder in found.folders]
        paths = [path for stem in stems for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py"))]
        return next((path for path in paths if path.is_file()), None)

    def folder(self, module: str) -> Path | None:
        """Return the folder of a package, also of one without `__init__.py`; None for a module."""
        top, *rest = module.split(".")
        found = self._top_level(top)
        folders = [] if found is None else [folder.joinpath(*rest) for folder in found.folders]
        return next((folder for folder in folders if folder.is_dir()), None)

    def exists(self, module: str) -> bool:
        """Return whether a module can be found. A library's modules may have no source, so its name is enough."""
        if self._top_level(module.partition(".")[0]) is None:
            return False
        return self.is_library(module) or self.file(module) is not None or self.folder(module) is not None

    def main(self, module: str) -> tuple[str, Path] | None:
        """Return name and source of what `python -m <module>` runs, or None if there is no such source."""
        folder = self.folder(module)
        name = module if folder is None or not (folder / "__main__.py").is_file() else f"{module}.__main__"
        file = self.file(name)
        return None if file is None or file.name == "__init__.py" else (name, file)


def _top_level(name: str) -> TopLevel | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # the name is empty, or the module has no spec
        return None
    if spec is None:
        return None
    has_source = spec.origin is not None and spec.origin.endswith(".py")
    file = Path(spec.origin) if has_source and spec.origin is not None else None
    return TopLevel(file=file, folders=tuple(Path(path) for path in spec.submodule_search_locations or ()))
