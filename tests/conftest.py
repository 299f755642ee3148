"""Number of examples of the property tests: few in every run, many with HYPOTHESIS_PROFILE=thorough."""

from __future__ import annotations

import gc
import os

from hypothesis import settings

gc.disable()  # imports make no garbage; pytest_collection_finish enables the collector again

settings.register_profile("short", max_examples=12, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_collection_finish() -> None:
    """Exclude the imported objects from garbage collection. They are never deleted, so scanning them is useless."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Include the imported objects again. Otherwise, DuckDB reports its objects as leaked when the process ends."""
    gc.unfreeze()
