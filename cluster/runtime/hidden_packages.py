"""Load an engine without optional packages that it would import only because they are installed.

LightGBM imports scikit-learn and matplotlib if they are installed. A replica uses neither, and they need most of the
time and memory of the import (`docs/performance.md`, Starts).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

UNUSED_BY_ENGINES = ("sklearn", "matplotlib")


@contextlib.contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Let imports of these packages fail like those of packages that are not installed, until the block ends.

    Packages that are loaded already are not hidden. Use it only while no other thread imports anything. What was loaded
    in the block must never need these packages later.
    """
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)
