"""Optional packages are hidden from an engine while it is loaded."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from cluster.runtime.hidden_packages import hidden


def test_hidden_package_cannot_be_imported_until_the_block_ends() -> None:
    """A hidden package counts as not installed. Afterwards it can be imported, and loaded packages are never hidden."""
    with hidden("no_such_package", "wave", "json"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("wave")
        importlib.import_module("json")
    assert importlib.import_module("wave").__name__ == "wave"
    assert "no_such_package" not in sys.modules


def test_lightgbm_loads_without_scikit_learn() -> None:
    """With the packages hidden, LightGBM loads as it does if they are not installed."""
    program = (
        "import sys\n"
        "from cluster.runtime.hidden_packages import UNUSED_BY_ENGINES, hidden\n"
        "with hidden(*UNUSED_BY_ENGINES):\n"
        "    from cluster.runtime.lightgbm_engine import LightGBMEngine\n"
        "print([name for name in ('sklearn', 'matplotlib', 'lightgbm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lightgbm']"
