"""The lock leaves out packages that no module imports. All modules import without them."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil

import pytest

ROOTS = ("cluster", "feature_jobs", "jobs", "serve_apps")
MODULES = sorted(
    module.name
    for root in ROOTS
    for module in pkgutil.walk_packages([root], prefix=f"{root}.")
    if not module.name.endswith("__main__")
)


def test_every_module_imports() -> None:
    """Every module imports, including those of commands.

    `__main__` is left out because importing it would run it.
    """
    assert len(MODULES) > 200
    for module in MODULES:
        importlib.import_module(module)


@pytest.mark.parametrize("name", ["kaleido", "nvidia-nccl-cu12"])
def test_packages_that_nothing_imports_are_not_installed(name: str) -> None:
    """NannyML's dependencies declare these packages. They take 690 MB."""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution(name)
