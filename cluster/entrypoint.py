"""Start and exit handling of every command `python -m <package>.<name> key=value …`.

Exit codes: 0 for success; 2 for a refused input or a failed gate, with one line on standard error; 1 for a failure,
with its traceback. By default, Hydra exits with 1 for an unknown override. So Hydra is set to raise its errors, and
this module reports them.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.command_line import given_names, is_table, option_names, quote_texts
from cluster.errors import (
    ConfigError,
    RefusedError,
    TrainingFailed,
    did_you_mean,
    refusal_behind,
    suggest_name,
)
from cluster.host.this_node import forget_node
from cluster.session import use_recorded_places
from cluster.settings import PlatformConfig
from cluster.settings_conversion import load
from cluster.storage import resolve, write_json

C = TypeVar("C")

PACKAGES = ("cluster", "feature_jobs", "jobs", "serve_apps", "configs")
REFUSED = 2
RESULT_VARIABLE = "FALAJ_RESULT"
"""Environment variable with the file that a command writes its result to, as JSON. A pipeline sets it."""
HELP = {"--help", "-h"}
_CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException, yaml.MarkedYAMLError)
"""What Hydra raises for an invalid command line or file."""


@dataclass(frozen=True, kw_only=True)
class Options(Generic[C]):
    """The options of a command: its configuration file, and the dataclass that validates it."""

    config_name: str
    schema: type[C]

    def compose(self, arguments: Sequence[str], *, config_dir: str | None = None) -> C:
        """Return the configuration that a command line gives, without running the command.

        Args:
            arguments: `key=value` arguments.
            config_dir: The caller's own folder of configurations, as `--config-dir` gives it.

        Raises:
            ConfigError: An argument is invalid.
        """
        overrides = quote_texts(arguments, self.schema)
        path = () if config_dir is None else (f"hydra.searchpath=[{_quoted(f'file://{config_dir}')}]",)
        try:
            # Composing is slow, so it is done once for each file, and values are set in a copy.
            return load(_set_values(_compose_once(self.config_name, path), overrides), self.schema)
        except (*_CONFIGURATION_ERRORS, ConfigError):
            pass
        try:
            return load(_compose(self.config_name, [*overrides, *path]), self.schema)
        except _CONFIGURATION_ERRORS as error:
            raise self.composition_error(error) from error

    def composition_error(self, error: Exception) -> ConfigError:
        """Return Hydra's error as a refusal of one line."""
        if isinstance(error, OverrideParseException):
            return ConfigError(
                f"`{error.override}` is not a valid `key=value`. Put a value with special characters in "
                "quotes: `key='value'`."
            )
        if isinstance(error, yaml.MarkedYAMLError):
            return ConfigError(_yaml_message(error))
        return ConfigError(_composition_message(error, self.schema))


@dataclass(frozen=True, kw_only=True)
class Command(Generic[C]):
    """The main function of a command."""

    options: Options[C]
    function: Callable[[C], Mapping[str, Any] | None]
    timed: bool
    uses_recorded_places: bool = True

    def __call__(self) -> None:
        """Compose the configuration from the command line, and run the function."""
        # With this variable, Hydra raises errors. Without it, Hydra prints them and exits with 1.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        if HELP & set(sys.argv[1:]):
            print(introduction(sys.modules[self.function.__module__].__doc__, self.options.config_name))
        sys.argv[1:] = quote_texts(sys.argv[1:], self.options.schema)
        try:
            hydra.main(version_base=None, config_path="pkg://configs", config_name=self.options.config_name)(
                self._run
            )()
        except _CONFIGURATION_ERRORS as error:
            refuse(self.options.composition_error(error))

    def _run(self, config: DictConfig) -> None:
        started = time.perf_counter()
        try:
            refuse_shadowed_packages()
            loaded = load(config, self.options.schema)
            if self.uses_recorded_places and isinstance(loaded, PlatformConfig):
                use_places(loaded)
            result = self.function(loaded)
            if result is not None and (path := os.environ.get(RESULT_VARIABLE)):
                write_json(path, dict(result))
            if self.timed:
                print(f"done in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        except Exception as error:
            # Ray wraps a worker's refusal in its own error, whose message is a traceback.
            refusal = refusal_behind(error)
            if isinstance(refusal, TrainingFailed):
                print(f"failed: {' '.join(str(refusal).split())}", file=sys.stderr, flush=True)
                sys.exit(1)
            if not isinstance(refusal, RefusedError):
                raise
            refuse(refusal)


def job(
    config_name: str | None, schema: type[C], *, timed: bool = False, uses_recorded_places: bool = True
) -> Callable[[Callable[[C], Mapping[str, Any] | None]], Command[C]]:
    """Turn `function(config)` into the main function of a command.

    If the function returns a dict, it is the command's result: a pipeline reads it from the file in `FALAJ_RESULT`.

    Args:
        config_name: Name of the configuration file, `configs/<config_name>.yaml`. With None, there is no file: the
            options are the fields of the schema. A user's own command needs no file.
        schema: Dataclass that validates the configuration.
        timed: Print the duration at the end, to standard error, because standard output has only the command's result.
        uses_recorded_places: Whether a command of the platform takes the places of state from the cluster's record.
            Commands that start a cluster or a node take them from their command line alone.
    """

    def decorate(function: Callable[[C], Mapping[str, Any] | None]) -> Command[C]:
        name = config_name or store_schema(schema, name=f"{function.__module__}.{schema.__name__}")
        return Command(
            options=Options(config_name=name, schema=schema),
            function=function,
            timed=timed,
            uses_recorded_places=uses_recorded_places,
        )

    return decorate


def use_places(config: PlatformConfig) -> None:
    """Set the paths and URLs of state: those on the command line, and those of the running cluster for the rest."""
    given = given_names()
    if config.storage.local is not None and "storage.local" in given:
        forget_node(unless_at=resolve(config.storage.local))
    use_recorded_places(config, given=given)


def store_schema(schema: type[Any], *, name: str) -> str:
    """Register a schema as a Hydra configuration without a file, and return the configuration's name."""
    options = OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
    assert isinstance(options, dict)
    platform = {field.name for field in fields(PlatformConfig)}
    own = {key: value for key, value in options.items() if key not in platform}
    ConfigStore.instance().store(name=name, node={"defaults": ["platform", "_self_"], **own})
    return name


def compose_platform(overrides: Sequence[str]) -> PlatformConfig:
    """Compose the platform's configuration without changing the Hydra state of the calling application.

    Raises:
        ConfigError: An override is invalid.
    """
    return load(_compose("platform", overrides), PlatformConfig)


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    callers_hydra = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("configs", version_base=None):
            return hydra.compose(config_name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = callers_hydra


def _quoted(text: str) -> str:
    return str(QuotedString(text=text, quote=Quote.single).with_quotes())


@functools.lru_cache(maxsize=64)
def _compose_once(config_name: str, overrides: tuple[str, ...]) -> DictConfig:
    return _compose(config_name, overrides)


def _set_values(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration with plain `key=value` overrides.

    Raises:
        ConfigError: An override does more than setting an option.
    """
    config = copy.deepcopy(config)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = override.key_or_group
        if override.type is not OverrideType.CHANGE or files("configs").joinpath(name).is_dir():
            raise ConfigError(f"{override.input_line} selects a configuration.")
        if override.package is not None or override.is_sweep_override():
            raise ConfigError(f"{override.input_line} is not a plain value.")
        OmegaConf.update(config, name, override.value(), merge=True)
    return config


def introduction(description: str | None, config_name: str) -> str:
    """Return the first part of `--help`: the command's description and its own options with their comments.

    Hydra prints the second part: the whole configuration without comments, with the command's own options last.
    """
    # cluster.yaml has no options of its own.
    file = "platform.yaml" if config_name == "cluster" else f"{config_name}.yaml"
    description = (description or "").strip()
    if not files("configs").joinpath(file).is_file():  # a user's own command
        return f"{description}\n\n== Hydra =="
    options = files("configs").joinpath(file).read_text(encoding="utf-8").strip()
    return f"{description}\n\n== Options of this command (configs/{file}) ==\n{options}\n\n== Hydra =="


def refuse(error: RefusedError) -> NoReturn:
    """Print one line and exit 2."""
    print(f"refused: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(REFUSED)


def refuse_shadowed_packages() -> None:
    """Refuse to run if another folder on the import path shadows one of Falaj's packages.

    Raises:
        ConfigError: A package is shadowed. The message names the folder.
    """
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != home:
            found_at = origin.parent if origin else "a folder without __init__.py"
            raise ConfigError(
                f"Package '{name}' is found at {found_at}, not beside '{home / 'cluster'}': a folder of yours has the "
                f"name of one of Falaj's packages ({', '.join(PACKAGES)}). Rename it, or start from another folder."
            )


def _group_options(group: str) -> set[str]:
    """Return the dotted names of the options in the files of `configs/<group>/`, such as `model.learning_rate`."""
    folder = files("configs").joinpath(group)
    choices = [file for file in folder.iterdir() if file.name.endswith(".yaml")] if folder.is_dir() else []
    options = [OmegaConf.create(file.read_text(encoding="utf-8")) for file in choices]
    return {f"{group}.{key}" for option in options for key in map(str, option)}


def _names_beside(cause: BaseException | None, name: str) -> list[str]:
    """Return the dotted names in the section of the file that has no option of this name; none without a section."""
    section = getattr(cause, "parent_node", None)
    table = name.rpartition(".")[0]
    if not isinstance(section, DictConfig) or not table or section._get_full_key(None) != table:
        return []
    return [f"{table}.{key}" for key in map(str, section)]


def _yaml_message(error: yaml.MarkedYAMLError) -> str:
    """Return the place and the problem of a file that is not valid YAML, as one line."""
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: "
    return (
        f"{place}not valid YAML: {error.problem or error.context}. Check the indentation, and put a text with ':', "
        "'#' or '{' in quotes."
    )


def _composition_message(error: Exception, schema: type[Any]) -> str:
    """Return Hydra's message as one line. For an unknown option, suggest the nearest known one."""
    cause = error.__cause__
    text = f"{error} {cause}" if cause is not None and str(cause) not in str(error) else str(error)
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown:
        name = unknown[1]
        known, group = option_names(schema), name.partition(".")[0]
        of_group = _group_options(group) if group in known else []
        known_tables = {name} & {*known, *of_group}
        for table in (name, name.rpartition(".")[0]):
            if table in known_tables or (not of_group and is_table(schema, table)):
                return (
                    f"Option '{table}' has no such entries. To add one, write `+{table}.NAME=VALUE`, for several "
                    f"`+{table}={{NAME: VALUE, …}}`."
                )
        known += [*of_group, *_names_beside(cause, name)]
        return f"No option '{name}'.{suggest_name(name, known)} `--help` lists the options."
    choice = re.search(r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':([^:]*)", text)
    if choice:
        group, name, known = choice[1], choice[2], choice[3].partition("Config search path")[0].split()
        return f"Option '{group}' has no choice '{name}'.{did_you_mean(name, known)}"
    return " ".join(text.partition("Config search path:")[0].split())
