"""Quoting and checks of `key=value` command-line arguments.

Hydra guesses the type of a value: `nan` and `1e5` become numbers, `true` becomes a boolean, and an apostrophe starts a
quoted string. So this module quotes the value of each text option, and Hydra then takes the value literally. Three
forms keep Hydra's meaning: a quoted string, an interpolation `${…}`, and `null` for an option that may be None.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from dataclasses import is_dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from cluster.errors import ConfigError

_ARGUMENT = re.compile(r"(?P<sign>\+{0,2})(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)
_PLAIN_LIST = re.compile(r"\[[^\[\]{}()'\"\\$]*\]")
MULTIRUN = frozenset({"-m", "--multirun"})


def quote_texts(arguments: Sequence[str], schema: type[Any]) -> list[str]:
    """Quote the value of each text option for Hydra.

    Args:
        arguments: Arguments of a command line.
        schema: Dataclass of the command's options.
    """
    if not MULTIRUN.isdisjoint(arguments):  # in a multirun a comma separates values
        return list(arguments)
    return [_quoted(argument, schema) for argument in arguments]


def refuse_unused(unused: Collection[str], *, by: str) -> None:
    """Refuse command-line options that have no effect on this run.

    Args:
        unused: Names of the options without effect.
        by: The option or mode of the command that makes them meaningless.

    Raises:
        ConfigError: One of these options is set. The message names the first one.
    """
    for name in sorted(given_options().intersection(unused)):
        raise ConfigError(f"Option `{name}` means nothing with `{by}`. Leave it out.")


def given_options() -> set[str]:
    """Return the top-level names of the options on this process's command line; empty outside a command."""
    return {name.partition(".")[0] for name in given_names()}


def given_names() -> set[str]:
    """Return the dotted names of the options on this process's command line; empty outside a command."""
    return named_options(_arguments())


def named_options(arguments: Iterable[str]) -> set[str]:
    """Return the dotted names of the options among arguments, such as `storage.local`."""
    return {match["key"] for argument in arguments if (match := _ARGUMENT.match(argument))}


def overrides_of(sections: Collection[str]) -> list[str]:
    """Return the arguments of this process's command line that set options of these sections (top-level names)."""
    return [
        argument
        for argument in _arguments()
        if (match := _ARGUMENT.match(argument)) and match["key"].partition(".")[0] in sections
    ]


def _arguments() -> Sequence[str]:
    return HydraConfig.get().overrides.task if HydraConfig.initialized() else ()


def option_names(schema: type[Any]) -> list[str]:
    """Return the dotted names of all options and sections of a dataclass, such as `source.path`."""
    return _names(OmegaConf.to_container(OmegaConf.structured(schema)), "")


def is_table(schema: type[Any], name: str) -> bool:
    """Return whether an option's value is a table with names that the caller chooses, such as `versions`."""
    option_type = _type_of(schema, name.split(".")) if name else None
    return any(typing.get_origin(member) is dict for member in _union_members(option_type))


def _names(values: Any, prefix: str) -> list[str]:
    if not isinstance(values, dict):
        return []
    return [
        name
        for key, value in values.items()
        for name in (f"{prefix}{key}", *_names(value, f"{prefix}{key}."))
    ]


def _quoted(argument: str, schema: type[Any]) -> str:
    match = _ARGUMENT.fullmatch(argument)
    option_type = _type_of(schema, match["key"].split(".")) if match else None
    if match is None or option_type is None:
        return argument
    value = match["value"]
    members = _union_members(option_type)
    if _is_hydra_syntax(argument, value) or (value == "null" and types.NoneType in members):
        return argument
    if str in members:
        return f"{match['sign']}{match['key']}={_literal(value)}"
    if any(typing.get_origin(member) is list and typing.get_args(member) == (str,) for member in members):
        return f"{match['sign']}{match['key']}={_list(value)}"
    return argument


def _is_hydra_syntax(argument: str, value: str) -> bool:
    """Return whether Hydra reads the value as a quoted string or an interpolation."""
    if not value:
        return True
    if value[0] not in ("'", '"') and "${" not in value:
        return False
    try:
        parsed = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return False
    return isinstance(parsed, str)


def _list(value: str) -> str:
    if not _PLAIN_LIST.fullmatch(value):
        return value
    items = [item.strip() for item in value[1:-1].split(",")]
    return f"[{','.join(_literal(item) for item in items if item)}]"


def _literal(text: str) -> str:
    # OmegaConf interpolates `${` in any text; a backslash escapes it.
    return str(QuotedString(text=text.replace("${", r"\${"), quote=Quote.single).with_quotes())


def _type_of(schema: Any, path: Iterable[str]) -> Any:
    """Return the type of the option at a path of names, or None if the schema does not define it."""
    current = schema
    for name in path:
        members = _union_members(current)
        section = next(
            (member for member in members if isinstance(member, type) and is_dataclass(member)), None
        )
        table = next((member for member in members if typing.get_origin(member) is dict), None)
        if section is not None:
            current = typing.get_type_hints(section).get(name)
        elif table is not None:
            current = typing.get_args(table)[1]
        else:
            return None
        if current is None:
            return None
    return current


def _union_members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)
