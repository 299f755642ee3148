"""Convert Hydra's configuration to the dataclasses of `cluster/settings.py`.

Also convert the dataclasses to plain values, which can be sent to other processes, and plain values to the dataclasses.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from cluster.errors import ConfigError, suggest_name
from cluster.settings import PlatformConfig

T = TypeVar("T")
_INTERPOLATION = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


def load(config: DictConfig, schema: type[T]) -> T:
    """Validate a composed configuration and return it as its dataclass.

    Raises:
        ConfigError: A key is unknown, a mandatory value is missing, or a value has a wrong type or is out of range.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        return cast(T, OmegaConf.to_object(merged))
    except InterpolationKeyError as error:
        raise ConfigError(_describe_interpolations(merged) or _describe(error)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_describe(error)) from error
    except OverflowError as error:
        raise ConfigError(f"A number is too large: {str(error).splitlines()[0]}.") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def to_plain(config: PlatformConfig) -> dict[str, Any]:
    """Return the platform's sections of a configuration as plain values, to send them to another process."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    names = {section.name for section in fields(PlatformConfig)}
    return {key: value for key, value in cast(dict[str, Any], values).items() if key in names}


def from_plain(values: dict[str, Any]) -> PlatformConfig:
    """Return the configuration whose plain values `to_plain` returned."""
    return load(OmegaConf.create(values), PlatformConfig)


def quoted(value: Any) -> str:
    """Return a value as a quoted string of Hydra."""
    text = str(value.value if isinstance(value, enum.Enum) else value).replace("'", "\\'")
    return f"'{text}'"


def unquoted(text: str) -> str:
    """Return the text of a value that `quoted` returned. Hydra's parser would take as long as a short command."""
    return text[1:-1].replace("\\'", "'")


def _describe_interpolations(config: DictConfig | ListConfig) -> str:
    """Return a sentence for each `${name}` that has no value in a configuration, with the nearest name that has one."""
    wanted = dict.fromkeys(_interpolations(OmegaConf.to_container(config, resolve=False)))
    sentences = []
    for name in wanted:
        table, _, key = name.rpartition(".")
        if key in _keys(config, table):
            continue
        known = [f"{table}.{key}".lstrip(".") for key in _keys(config, table)]
        sentences.append(f"`${{{name}}}` has no value.{suggest_name(name, known)}")
    return " ".join(sentences)


def _interpolations(values: Any) -> Iterator[str]:
    """Yield the dotted names that the texts of nested values interpolate."""
    match values:
        case str():
            yield from _INTERPOLATION.findall(values)
        case dict():
            for value in values.values():
                yield from _interpolations(value)
        case list():
            for value in values:
                yield from _interpolations(value)


def _keys(config: DictConfig | ListConfig, table: str) -> list[str]:
    """Return the keys of a section; none if it is no section."""
    section = OmegaConf.select(config, table) if table else config
    return [str(key) for key in section] if isinstance(section, DictConfig) else []


def _describe(error: OmegaConfBaseException) -> str:
    reason = str(error.msg or error).splitlines()[0].rstrip(".")
    key = f"'{error.full_key}': " if error.full_key else ""
    if reason.startswith("Structured config of type") or "Missing mandatory value" in reason:
        return f"Configuration {key}a value is needed; give it as `{error.full_key}=…`."
    return f"Configuration {key}{reason}. `--cfg job` shows the current values."
