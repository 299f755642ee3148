"""How hard the property tests look: a little in every run, thoroughly with HYPOTHESIS_PROFILE=thorough."""

from __future__ import annotations

import gc
import os

from hypothesis import settings

gc.disable()  # imports leave nothing to collect, and pytest_collection_finish turns it on again

settings.register_profile("short", max_examples=12, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_collection_finish() -> None:
    """What was imported stays, so the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Or what DuckDB made would be reported as leaked when the process ends."""
    gc.unfreeze()
