"""The words of a command line, `key=value`, before and after Hydra reads them.

Hydra gives a value the type that it looks like: `nan` and `1e5` become numbers, `true` a flag, and an apostrophe is the
beginning of a quotation. So where an option is text, its value is quoted before Hydra sees it, and means itself. Three
forms keep the meaning that Hydra gives them: a quotation, an interpolation `${…}`, and `null` where an option may be
none.
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

_WORD = re.compile(r"(?P<sign>\+{0,2})(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)
_PLAIN_LIST = re.compile(r"\[[^\[\]{}()'\"\\$]*\]")
_MULTIRUN = frozenset({"-m", "--multirun"})


def quote_texts(words: Sequence[str], schema: type[Any]) -> list[str]:
    """The words, with the value of each option that is text quoted for Hydra.

    Args:
        words: of a command line.
        schema: the dataclass of its options.
    """
    if not _MULTIRUN.isdisjoint(words):  # a comma separates values there
        return list(words)
    return [_quoted(word, schema) for word in words]


def refuse_unused(unused: Collection[str], *, by: str) -> None:
    """Refuse options that were given on the command line and mean nothing for what it does.

    Args:
        unused: their names.
        by: what the command does.

    Raises:
        ConfigError: naming the first.
    """
    for name in sorted(given_options().intersection(unused)):
        raise ConfigError(f"Option `{name}` means nothing with `{by}`. Leave it out.")


def given_options() -> set[str]:
    """The first part of the name of each option on this process's command line; empty outside a command."""
    if not HydraConfig.initialized():
        return set()
    return {
        match["key"].split(".")[0]
        for word in HydraConfig.get().overrides.task
        if (match := _WORD.match(word))
    }


def option_names(schema: type[Any]) -> list[str]:
    """Each option that a dataclass knows, and each section of options, as a command line names it: `source.path`."""
    return _names(OmegaConf.to_container(OmegaConf.structured(schema)), "")


def _names(values: Any, prefix: str) -> list[str]:
    if not isinstance(values, dict):
        return []
    return [
        name
        for key, value in values.items()
        for name in (f"{prefix}{key}", *_names(value, f"{prefix}{key}."))
    ]


def _quoted(word: str, schema: type[Any]) -> str:
    match = _WORD.fullmatch(word)
    wanted = _type_of(schema, match["key"].split(".")) if match else None
    if match is None or wanted is None:
        return word
    value = match["value"]
    options = _alternatives(wanted)
    if _means_something(word, value) or (value == "null" and types.NoneType in options):
        return word
    if str in options:
        return f"{match['sign']}{match['key']}={_literal(value)}"
    if any(typing.get_origin(one) is list and typing.get_args(one) == (str,) for one in options):
        return f"{match['sign']}{match['key']}={_list(value)}"
    return word


def _means_something(word: str, value: str) -> bool:
    """Whether a value is a quotation or has an interpolation, as Hydra reads it."""
    if not value:
        return True
    if value[0] not in ("'", '"') and "${" not in value:
        return False
    try:
        parsed = OverridesParser.create().parse_override(word).value()
    except HydraException:
        return False
    return isinstance(parsed, str)


def _list(value: str) -> str:
    if not _PLAIN_LIST.fullmatch(value):
        return value
    items = [item.strip() for item in value[1:-1].split(",")]
    return f"[{','.join(_literal(item) for item in items if item)}]"


def _literal(text: str) -> str:
    # OmegaConf reads `${` in any text; a backslash before it makes it mean itself.
    return str(QuotedString(text=text.replace("${", r"\${"), quote=Quote.single).with_quotes())


def _type_of(schema: Any, path: Iterable[str]) -> Any:
    """The type of the option at a path of names; none where the schema does not say."""
    found = schema
    for name in path:
        choices = _alternatives(found)
        section = next((one for one in choices if isinstance(one, type) and is_dataclass(one)), None)
        table = next((one for one in choices if typing.get_origin(one) is dict), None)
        if section is not None:
            found = typing.get_type_hints(section).get(name)
        elif table is not None:
            found = typing.get_args(table)[1]
        else:
            return None
        if found is None:
            return None
    return found


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    return typing.get_args(wanted) if union else (wanted,)
