"""The command line of a stage, from its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString

from cluster.command_line import given_names, overrides_of
from cluster.errors import ConfigError
from cluster.settings import PlatformConfig

_STAGE_ONLY = {"scaling", "replica"}
_FOR_ALL_STAGES = {section.name for section in fields(PlatformConfig)} - _STAGE_ONLY
"""Sections whose options on the pipeline's command line are passed on to all stages."""


def arguments(parameters: Mapping[str, Any]) -> list[str]:
    """Return parameters as `key=value` arguments. Nested parameters become dotted options."""
    return [f"{name}={_text(value)}" for name, value in _flat(parameters, "")]


def callers_arguments() -> list[str]:
    """Return this command line's options that all stages get: the platform's sections, such as `identity`.

    Raises:
        ConfigError: An option is of a section that only one stage may have.
    """
    for name in sorted(given_names()):
        if name.partition(".")[0] in _STAGE_ONLY:
            raise ConfigError(
                f"{name} is no option of a pipeline. Set it in `parameters` of the stage that deploys."
            )
    return overrides_of(_FOR_ALL_STAGES)


def callers_config_dir() -> str | None:
    """Return the folder of this command line's `--config-dir`."""
    if not HydraConfig.initialized():
        return None
    sources = HydraConfig.get().runtime.config_sources
    return next((source.path for source in sources if source.provider == "command-line"), None)


def pipeline_name() -> str | None:
    """Return the choice of this command line's `pipeline=<name>`."""
    name = HydraConfig.get().runtime.choices.get("pipeline") if HydraConfig.initialized() else None
    return None if name is None else str(name)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    match value:
        case None:
            return "null"
        case Mapping():
            return "{}"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{','.join(_item(item) for item in value)}]"
        case _:
            return str(value)


def _item(value: Any) -> str:
    return (
        QuotedString(text=value, quote=Quote.single).with_quotes() if isinstance(value, str) else _text(value)
    )
