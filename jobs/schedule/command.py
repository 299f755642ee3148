"""The command line of a schedule's command, and its check."""

from __future__ import annotations

import importlib
import sys

from cluster.errors import ConfigError
from jobs.pipeline.stage.arguments import arguments
from jobs.schedule.config import ScheduleSpec
from jobs.schedule.schedules import Schedule

CONFIG_DIR = "--config-dir"


def command_line(schedule: Schedule) -> list[str]:
    """Return the command line: program, module and options."""
    return [sys.executable, "-m", *module_and_options(schedule.spec, config_dir=schedule.config_dir)]


def module_and_options(spec: ScheduleSpec, *, config_dir: str | None) -> list[str]:
    """Return the module and its options."""
    folder = () if config_dir is None else (CONFIG_DIR, config_dir)
    return [spec.command, *folder, *arguments(spec.parameters)]


def check_command(spec: ScheduleSpec, *, config_dir: str | None) -> None:
    """Require that the command exists, and that it accepts its options.

    Raises:
        ConfigError: There is no such module, it is no command, or it refuses an option.
    """
    try:
        module = importlib.import_module(
            f"{spec.command}.__main__" if _is_package(spec.command) else spec.command
        )
    except ImportError as error:
        raise ConfigError(f"schedule.command: '{spec.command}' cannot be imported: {error}.") from error
    main = getattr(module, "main", None)
    if main is None or not hasattr(main, "compose"):
        raise ConfigError(
            f"schedule.command: '{spec.command}' is no command. Its `main` needs the decorator `job`."
        )
    main.compose(arguments(spec.parameters), config_dir=config_dir)


def _is_package(name: str) -> bool:
    return hasattr(importlib.import_module(name), "__path__")
