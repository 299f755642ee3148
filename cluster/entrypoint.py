"""Start and exit handling of every command `python -m <package>.<name> key=value …`.

Exit codes: 0 for success; 2 for a refused input or a failed gate, with one line on standard error; 1 for a failure,
with its traceback. By default, Hydra exits with 1 for an unknown override. So Hydra is set to raise its errors, and
this module reports them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.command_line import given_options, is_given, option_names, quote_texts
from cluster.errors import ConfigError, RefusedError, did_you_mean, refusal_behind, suggest_name
from cluster.host.this_node import forget_node
from cluster.session import use_recorded_places
from cluster.settings import PlatformConfig
from cluster.settings_conversion import load
from cluster.storage import resolve

C = TypeVar("C")

PACKAGES = ("cluster", "feature_jobs", "jobs", "serve_apps", "configs")
REFUSED = 2
HELP = {"--help", "-h"}


def job(
    config_name: str, schema: type[C], *, timed: bool = False
) -> Callable[[Callable[[C], None]], Callable[[], None]]:
    """Turn `function(config)` into the main function of a command.

    Args:
        config_name: Name of the configuration file, `configs/<config_name>.yaml`.
        schema: Dataclass that validates the configuration.
        timed: Print the duration at the end, to standard error, because standard output has only the command's result.
    """

    def decorate(function: Callable[[C], None]) -> Callable[[], None]:
        def task(config: DictConfig) -> None:
            started = time.perf_counter()
            try:
                refuse_shadowed_packages()
                loaded = load(config, schema)
                if isinstance(loaded, PlatformConfig):
                    use_places(loaded)
                function(loaded)
                if timed:
                    print(f"done in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            except Exception as error:
                # Ray wraps a worker's refusal in its own error, whose message is a traceback.
                refusal = refusal_behind(error)
                if not isinstance(refusal, RefusedError):
                    raise
                refuse(refusal)

        def main() -> None:
            # With this variable, Hydra raises errors. Without it, Hydra prints them and exits with 1.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            if HELP & set(sys.argv[1:]):
                print(introduction(sys.modules[function.__module__].__doc__, config_name))
            sys.argv[1:] = quote_texts(sys.argv[1:], schema)
            try:
                hydra.main(version_base=None, config_path="pkg://configs", config_name=config_name)(task)()
            except OverrideParseException as error:
                refuse(
                    ConfigError(
                        f"`{error.override}` is not a valid `key=value`. Put a value with special characters in "
                        "quotes: `key='value'`."
                    )
                )
            except (HydraException, OmegaConfBaseException) as error:
                refuse(ConfigError(_composition_message(error, schema)))

        return main

    return decorate


def use_places(config: PlatformConfig) -> None:
    """Let a command use the places of state that its command line names, and the cluster's places for the rest."""
    if config.storage.local is not None and is_given("storage.local"):
        forget_node(unless_at=resolve(config.storage.local))
    use_recorded_places(config, given=given_options())


def compose_platform(overrides: Sequence[str]) -> PlatformConfig:
    """Compose the platform's configuration without changing the Hydra state of the calling application.

    Raises:
        ConfigError: An override is invalid.
    """
    callers_hydra = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("configs", version_base=None):
            return load(hydra.compose("platform", overrides=list(overrides)), PlatformConfig)
    finally:
        GlobalHydra.instance().hydra = callers_hydra


def introduction(description: str | None, config_name: str) -> str:
    """Return the first part of `--help`: the command's description and its own options with their comments.

    Hydra prints the second part: the whole configuration without comments, with the command's own options last.
    """
    file = (
        "platform.yaml" if config_name == "cluster" else f"{config_name}.yaml"
    )  # cluster.yaml has no own options
    options = files("configs").joinpath(file).read_text(encoding="utf-8").strip()
    description = (description or "").strip()
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


def _composition_message(error: Exception, schema: type[Any]) -> str:
    """Return Hydra's message as one line. For an unknown option, suggest the nearest known one."""
    cause = error.__cause__
    text = f"{error} {cause}" if cause is not None and str(cause) not in str(error) else str(error)
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown:
        name = unknown[1]
        known, group = option_names(schema), name.partition(".")[0]
        if group in known:
            known += _group_options(group)
        return f"No option '{name}'.{suggest_name(name, known)} `--help` lists the options."
    choice = re.search(r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':([^:]*)", text)
    if choice:
        group, name, known = choice[1], choice[2], choice[3].partition("Config search path")[0].split()
        return f"Option '{group}' has no choice '{name}'.{did_you_mean(name, known)}"
    return " ".join(text.partition("Config search path:")[0].split())
