"""Tests that every command in messages and guides exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("cluster", "feature_jobs", "jobs", "serve_apps")
ADVICE = re.compile(rf"python -m ((?:{'|'.join(PACKAGES)})(?:\.[a-z_]+)+)")
READ = [
    *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")),
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "README.md",
]
COMMANDS = sorted({name for path in READ for name in ADVICE.findall(path.read_text())})


@pytest.mark.parametrize("command", COMMANDS)
def test_named_command_can_be_run(command: str) -> None:
    found = importlib.util.find_spec(command)
    assert found is not None, command
    assert found.origin is not None, command
    main = Path(found.origin)
    if main.name == "__init__.py":
        main = main.with_name("__main__.py")
    assert 'if __name__ == "__main__":' in main.read_text()
