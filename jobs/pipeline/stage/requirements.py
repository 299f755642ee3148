"""What a stage's result must satisfy: `auc: 0.88`, `rows: ">0"`, `verdict: passed`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from cluster.errors import suggest_name

_COMPARISON = re.compile(r"(>=|<=|==|!=|>|<)\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def requirement_fault(name: str, wanted: Any, *, single: Collection[str] | None = None) -> str:
    """Return what is wrong with a requirement, or "" if nothing is.

    Args:
        name: What is required.
        wanted: What it must satisfy.
        single: Names without dots that each stand for one value of the result; None if this is not known.
    """
    if single is not None and "." not in name and name not in single:
        return (
            f"require.{name}: the result has several values of this name, one for each slice. Write the whole name, "
            f"such as metrics.{name}."
        )
    if isinstance(wanted, str) and wanted[:1] in tuple("<>=!") and not _COMPARISON.fullmatch(wanted.strip()):
        return f"require.{name} is '{wanted}'. Write a comparison with a number, such as '>0'."
    if wanted is None or isinstance(wanted, dict | list):
        return f"require.{name} must be a number, a text or a comparison such as '>0'."
    return ""


def unmet(require: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each requirement that a result does not satisfy.

    Args:
        require: Maps name to what is wanted. A name without dots also finds a nested value, such as `auc` for
            `metrics.auc`, if only one value has this name.
        result: The result of the stage, flat, with dotted names.
    """
    return [sentence for name, wanted in require.items() if (sentence := _sentence(name, wanted, result))]


def _sentence(name: str, wanted: Any, result: Mapping[str, Any]) -> str:
    names = [name] if name in result else [key for key in result if key.endswith(f".{name}")]
    if len(names) > 1:
        several = ", ".join(names)
        return f"{name} is required, but the result has several values of this name: {several}. Write the whole name."
    if not names:
        return f"{name} is required, but the result has no value of this name.{suggest_name(name, result)}"
    value = result[names[0]]
    if isinstance(wanted, str) and (comparison := _COMPARISON.fullmatch(wanted.strip())):
        symbol, limit = comparison[1], float(comparison[2])
    elif isinstance(wanted, int | float) and not isinstance(wanted, bool):
        symbol, limit = ">=", float(wanted)
    else:
        return "" if value == wanted else f"{name} is {value}, but must be {wanted}."
    if not isinstance(value, int | float) or isinstance(value, bool):
        return f"{name} is {value!r}, which is no number, but must be {symbol} {limit:g}."
    return "" if _OPERATORS[symbol](value, limit) else f"{name} is {value:g}, but must be {symbol} {limit:g}."
