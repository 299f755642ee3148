"""Load an engine without optional packages that it would import only because they are installed.

LightGBM imports scikit-learn and matplotlib if it finds them. A replica uses neither, and they are most of its import:
with them it takes 1.3 s of CPU and 99 MiB, without them 0.2 s and 20 MiB.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

UNUSED_BY_ENGINES = ("sklearn", "matplotlib")


@contextlib.contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Let imports of these packages fail like those of packages that are not installed, until the block ends.

    Packages that are loaded already are not hidden. Use it only while no other thread imports anything, and only in a
    process that never uses what was loaded inside with these packages.
    """
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)
