"""How every `python -m <package>.<name> key=value …` starts and ends.

Exit code 0 is success, 2 a refused input or gate with one line on standard error, 1 a failure with its traceback.
Hydra's own reporting exits 1 for an unknown override, so composition is run with its errors let through.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cluster.command_line import option_names, quote_texts
from cluster.errors import ConfigError, RefusedError, nearest, refusal_behind
from cluster.settings import load

C = TypeVar("C")

PACKAGES = ("cluster", "feature_jobs", "jobs", "serve_apps", "configs")
REFUSED = 2
HELP = {"--help", "-h"}


def job(
    config_name: str, schema: type[C], *, timed: bool = False
) -> Callable[[Callable[[C], None]], Callable[[], None]]:
    """Make `function(config)` the main of a module.

    Args:
        config_name: of `configs/<config_name>.yaml`.
        schema: what the configuration is held against.
        timed: say at the end how long it took; on standard error, because standard output is the result.
    """

    def decorate(function: Callable[[C], None]) -> Callable[[], None]:
        def task(config: DictConfig) -> None:
            started = time.perf_counter()
            try:
                refuse_shadowed_packages()
                function(load(config, schema))
                if timed:
                    print(f"done in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            except Exception as error:
                # A refusal inside a worker comes wrapped in Ray's own error, whose message is a traceback.
                refusal = refusal_behind(error)
                if not isinstance(refusal, RefusedError):
                    raise
                refuse(refusal)

        def main() -> None:
            # Read by Hydra when it runs: raise instead of printing and exiting 1.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            if HELP & set(sys.argv[1:]):
                print(introduction(sys.modules[function.__module__].__doc__, config_name))
            sys.argv[1:] = quote_texts(sys.argv[1:], schema)
            try:
                hydra.main(version_base=None, config_path="pkg://configs", config_name=config_name)(task)()
            except OverrideParseException as error:
                refuse(
                    ConfigError(
                        f"`{error.override}` is no `key=value` of Hydra's. Put a value with special characters between "
                        "quotes: `key='value'`."
                    )
                )
            except (HydraException, OmegaConfBaseException) as error:
                refuse(ConfigError(_composition_message(error, schema)))

        return main

    return decorate


def introduction(description: str | None, config_name: str) -> str:
    """What `--help` says first: what the command is for, and its own options as their file describes them.

    Hydra's help follows with the whole configuration. It has no comments, and the command's options come last in it.
    """
    options = files("configs").joinpath(f"{config_name}.yaml").read_text(encoding="utf-8").strip()
    description = (description or "").strip()
    return f"{description}\n\n== Options of this command (configs/{config_name}.yaml) ==\n{options}\n\n== Hydra =="


def refuse(error: RefusedError) -> NoReturn:
    """Print one line and exit 2."""
    print(f"refused: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(REFUSED)


def refuse_shadowed_packages() -> None:
    """Raise when a folder on the path stands in front of one of our packages.

    Raises:
        ConfigError: naming the folder.
    """
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != home:
            where = origin.parent if origin else "a folder without __init__.py"
            raise ConfigError(
                f"Package '{name}' is found at {where}, not beside '{home / 'cluster'}': a folder of yours has the "
                f"name of one of Falaj's packages ({', '.join(PACKAGES)}). Rename it, or start from another folder."
            )


def _composition_message(error: Exception, schema: type[Any]) -> str:
    """Hydra's message in one line; of an unknown option the nearest known one, where Hydra would say "append it"."""
    cause = error.__cause__
    text = f"{error} {cause}" if cause is not None and str(cause) not in str(error) else str(error)
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown:
        name = unknown[1]
        return f"No option '{name}'.{nearest(name, option_names(schema))} `--help` lists the options."
    return " ".join(text.partition("Config search path:")[0].split())
