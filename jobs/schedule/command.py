"""The command line of a schedule's command, and its check."""

from __future__ import annotations

import sys

from cluster.errors import ConfigError
from jobs.pipeline.stage.arguments import arguments
from jobs.pipeline.stage.commands import load_options
from jobs.pipeline.stage.modules import Modules
from jobs.schedule.config import ScheduleSpec
from jobs.schedule.schedules import Schedule

CONFIG_DIR = "--config-dir"
LOADS = "A schedule's run"
"""What loads a schedule's folders, for the message of `require_unchangeable`."""


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
    options = load_options(spec.command, Modules())
    if options is None:
        raise ConfigError(
            f"schedule.command: '{spec.command}' is no command. Its `main` needs the decorator `job`."
        )
    options.compose(arguments(spec.parameters), config_dir=config_dir)
