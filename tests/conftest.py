"""Number of examples of the property tests: few in every run, many with HYPOTHESIS_PROFILE=thorough."""

from __future__ import annotations

import gc
import os

from hypothesis import settings

gc.disable()  # imports leave no garbage; pytest_collection_finish enables it again

settings.register_profile("short", max_examples=12, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_collection_finish() -> None:
    """Freeze the imported objects. They stay alive, so the garbage collector need not scan them again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Unfreeze the objects. Otherwise DuckDB's objects would be reported as leaked when the process ends."""
    gc.unfreeze()
