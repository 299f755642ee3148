"""Parse outcomes: convert an outcome to one of a model's classes or to a number.

All code that receives, reads or compares outcomes uses this module, so that outcomes have the same meaning everywhere.

JSON can write a class in several ways: 1, 1.0, true and "1" are the class 1. A boolean class is true or false, or 1 or
0, and never text. A regression's outcome is a number in the range of float32, and never text, like a model's inputs. A
larger number cannot be correct, and its square would be infinite and make all figures of the version useless.
"""

from __future__ import annotations

from typing import Any

from cluster.runtime.list_encoding import MAX_FLOAT32
from cluster.runtime.signature import Label, ModelSignature

SHOWN_CLASSES = 10


class OutcomeParser:
    """Parser of the outcomes of one model version."""

    def __init__(self, signature: ModelSignature) -> None:
        self._classes = signature.classes
        self._by_text: dict[str, Label] = {}
        self._by_number: dict[float, Label] = {}
        for name in signature.classes or ():
            if isinstance(name, str):
                self._by_text[name] = name
                if name.removeprefix("-").isdecimal() and str(int(name)) == name:
                    self._by_number[int(name)] = name
            else:
                self._by_number[name] = name
                if not isinstance(name, bool):
                    self._by_text[str(name)] = name

    @property
    def expected(self) -> str:
        """Description of valid outcomes, for error messages."""
        if self._classes is None:
            return f"a number of at most {MAX_FLOAT32:.3g}"
        shown = ", ".join(map(repr, self._classes[:SHOWN_CLASSES]))
        more = len(self._classes) - SHOWN_CLASSES
        return f"one of the model's classes {shown}" + (f" and {more} more" if more > 0 else "")

    def parse(self, value: Any) -> Label | None:
        """Return the class or the number that an outcome means, or None if it is invalid."""
        if self._classes is None:
            return _number(value)
        if isinstance(value, str):
            return self._by_text.get(value)
        if not isinstance(value, int | float):
            return None
        label = self._by_number.get(value)
        return None if isinstance(value, bool) and isinstance(label, str) else label


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if -MAX_FLOAT32 <= number <= MAX_FLOAT32 else None
