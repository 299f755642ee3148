"""The source code of a function and of everything that it uses from its own package, as one text to hash.

Functions of other packages are not included, so a change in a library does not change the hash.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

from cluster.errors import DefinitionError


def source_code(function: Any) -> str:
    """Return the source of a function, and of the functions and plain constants that it uses from its own package.

    Raises:
        DefinitionError: `function` is not a plain function, or its source cannot be read.
    """
    if not inspect.isfunction(function):
        raise DefinitionError(f"A transform must be a plain function, got {function!r}.")
    parts: dict[str, str] = {}
    _collect(function, parts)
    return "\n".join(parts[name] for name in sorted(parts))


def _collect(function: types.FunctionType, parts: dict[str, str]) -> None:
    key = f"{function.__module__}:{function.__qualname__}"
    if key in parts:
        return
    try:
        parts[key] = inspect.getsource(function)
    except (OSError, TypeError) as error:
        raise DefinitionError(
            f"The source of transform '{key}' cannot be read: {error}. Write it in a module's file."
        ) from error
    for name, value in _used(function):
        if inspect.isfunction(value) and _package(value) == _package(function):
            _collect(value, parts)
        elif _is_plain(value):
            parts[f"{key}.{name}"] = _text(value)


def _used(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    names = sorted(set(_names(function.__code__)))
    yield from ((name, function.__globals__[name]) for name in names if name in function.__globals__)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    yield from ((name, cell.cell_contents) for name, cell in cells)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _package(function: types.FunctionType) -> str:
    return function.__module__.partition(".")[0]


def _is_plain(value: Any) -> bool:
    match value:
        case bool() | int() | float() | str() | bytes() | None:
            return True
        case list() | tuple() | set() | frozenset():
            return all(_is_plain(item) for item in value)
        case dict():
            return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
        case _:
            return False


def _text(value: Any) -> str:
    # The order of a set differs between processes.
    return repr(sorted(value, key=repr)) if isinstance(value, set | frozenset) else repr(value)
