"""What must be equal on all nodes of a cluster: Python, Ray, and this platform's own code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

PACKAGES = ("cluster", "feature_jobs", "jobs", "serve_apps")


def release() -> str:
    """Return this installation's release: versions, and a hash of the code. A version number does not cover edits."""
    python = ".".join(map(str, sys.version_info[:2]))
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("falaj", "ray"))
    return ", ".join((*versions, f"Python {python}", f"code {_code_hash()}"))


def _code_hash() -> str:
    root, content = Path(__file__).parents[2], hashlib.sha256()
    files = (
        file
        for package in PACKAGES
        for file in (root / package).rglob("*")
        if file.suffix in (".py", ".cedar")
    )
    for file in sorted(files):
        content.update(f"{file.relative_to(root)}\0".encode())
        content.update(hashlib.sha256(file.read_bytes()).digest())
    return content.hexdigest()[:12]
