"""Hashes of what a stage depends on: files, parts of the platform, and the code of its modules."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.ledger import Ledger
from cluster.ledger.events import FeatureServiceApplied, FeatureViewApplied
from cluster.registry import LATEST, Registry
from cluster.storage import Layout, exists, file_system, is_uri, list_files, sha256
from feature_jobs.store.offline.tables import open_table
from jobs.pipeline.graph import is_path, is_pattern
from jobs.pipeline.stage.modules import Modules

ABSENT = "absent"
HAS_NO_CONTENT = ("log", "online", "serving")
"""Kinds of parts that change all the time and have no content of their own."""


def digest_json(content: Any) -> str:
    """Return a hash of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def digest_path(path: str) -> str:
    """Return a hash of a file's content, of all files of a folder, or of all files that a pattern matches.

    The hash of a remote file is computed from its ETag, so the file is not read.
    """
    if is_uri(path):
        fs, remote = file_system(path)
        found = sorted(fs.glob(remote)) if is_pattern(remote) else sorted(fs.find(remote))
        return digest_json([[name, str(fs.checksum(name))] for name in found]) if found else ABSENT
    if Path(path).is_file():
        return sha256(path)
    files = list(matching_files(path))
    return digest_json([[str(file), sha256(str(file))] for file in files]) if files else ABSENT


def matching_files(path: str) -> Iterator[Path]:
    """Yield the local files of a folder or pattern, sorted. Hidden files are left out."""
    folder = Path(path)
    if folder.is_dir():
        found: Iterable[Path] = folder.rglob("*")
    elif is_pattern(path):
        found = Path("/").glob(path.lstrip("/"))
    else:
        found = [folder]
    yield from sorted(file for file in found if file.is_file() and not file.name.startswith("."))


def path_exists(path: str) -> bool:
    """Return whether a file or folder exists, or a pattern matches a file."""
    if is_uri(path):
        return exists(path) or bool(list_files(path))
    return exists(path) or any(True for _ in matching_files(path))


class Platform:
    """Hashes of the parts of the platform, from the ledger and the feature tables."""

    def __init__(self, ledger: Ledger, places: Layout) -> None:
        self._ledger = ledger
        self._places = places
        self._registry = Registry(ledger, places)

    def digest(self, name: str) -> str:
        """Return a hash of a file or part. A part that has no content of its own, such as a log, has its name."""
        if is_path(name):
            return digest_path(name)
        kind, _, part = name.partition(":")
        match kind:
            case "view":
                applied = self._ledger.newest(FeatureViewApplied, view=part)
                table = open_table(self._places.features(part))
                version = None if table is None else table.version()
                return digest_json([applied and applied.payload["version"], version])
            case "service":
                service = self._ledger.newest(FeatureServiceApplied, service=part)
                return digest_json(service and service.payload["version"])
            case "model":
                model, _, number = part.partition("/")
                if not self._registry.versions(model):
                    return ABSENT
                return self._registry.get(model, number or LATEST).manifest_hash
            case _:
                return name

    def digest_written(self, name: str) -> str:
        """Return the hash of an output. A part without content of its own gets a new hash each time it is written."""
        found = self.digest(name)
        return f"{name}@{self._ledger.head()}" if found == name else found


class CodeHashes:
    """Hashes of modules and of everything that they import, without installed packages."""

    def __init__(self) -> None:
        self._imports: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._modules = Modules()

    def digest(self, modules: Iterable[str]) -> str:
        """Return a hash of the code of modules and of all their imports.

        Of a command that is a package, all modules count, because it may load some of them by name.
        """
        seen: dict[str, str] = {}
        queue = [name for module in modules for name in self._with_main(module)]
        while queue:
            module = queue.pop()
            if module in seen:
                continue
            seen[module], imports = self._read(module)
            queue += imports
            if parent := module.rpartition(".")[0]:  # importing a module runs its packages first
                queue.append(parent)
        return digest_json({module: code for module, code in seen.items() if code})

    def _read(self, module: str) -> tuple[str, tuple[str, ...]]:
        if module not in self._imports:
            path = self._modules.own_file(module)
            content = path.read_bytes() if path else b""
            package = module if path and path.name == "__init__.py" else module.rpartition(".")[0]
            code = hashlib.sha256(content).hexdigest() if path else ""
            self._imports[module] = (code, tuple(_imported(content, package)))
        return self._imports[module]

    def _with_main(self, module: str) -> Iterator[str]:
        yield module
        folder = None if self._modules.is_library(module) else self._modules.folder(module)
        if folder is not None and (folder / "__main__.py").is_file():
            for file in sorted(folder.rglob("*.py")):
                parts = file.relative_to(folder).with_suffix("").parts
                yield ".".join([module, *(part for part in parts if part != "__init__")])


def _imported(content: bytes, package: str) -> Iterator[str]:
    """Yield the names of the modules that a source imports, also inside functions."""
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def flatten(values: Mapping[str, Any], *, limit: int, prefix: str = "") -> dict[str, Any]:
    """Return the texts and numbers of nested values, with the names joined by dots. Outer values come first."""
    found: dict[str, Any] = {}
    nested: list[tuple[str, Mapping[str, Any]]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            nested.append((f"{prefix}{key}.", value))
        elif isinstance(value, str | int | float | bool) and len(found) < limit:
            found[f"{prefix}{key}"] = value
    for name, inner in nested:
        found |= flatten(inner, limit=limit - len(found), prefix=name)
    return found
