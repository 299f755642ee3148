"""What an outcome means for a model: one of its classes, or a number. Whoever takes, reads or compares outcomes asks
here, so that all agree.

JSON has several ways to write a class: 1, 1.0, true and "1" are the class 1. A flag is true or false, or 1 or 0, and no
text. A regression's outcome is a number that a float32 can hold, and no text: as it is with a model's inputs. A greater
one can be no truth, and its square would be infinite, which would make every figure of its version say nothing.
"""

from __future__ import annotations

from typing import Any

from cluster.runtime.signature import Label, ModelSignature

SHOWN_CLASSES = 10
_GREATEST = 3.4028234663852886e38
"""Of a float32."""


class Truths:
    """Of one model version."""

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
    def wanted(self) -> str:
        """What an outcome must be, in words."""
        if self._classes is None:
            return f"a number of at most {_GREATEST:.3g}"
        shown = ", ".join(map(repr, self._classes[:SHOWN_CLASSES]))
        more = len(self._classes) - SHOWN_CLASSES
        return f"one of the model's classes {shown}" + (f" and {more} more" if more > 0 else "")

    def of(self, value: Any) -> Label | None:
        """The class that an outcome means, or the number; None where it can mean none."""
        if self._classes is None:
            return _number(value)
        if isinstance(value, str):
            return self._by_text.get(value)
        if not isinstance(value, int | float):
            return None
        found = self._by_number.get(value)
        return None if isinstance(value, bool) and isinstance(found, str) else found


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if -_GREATEST <= number <= _GREATEST else None
