"""The command line of a schedule's command, and its check."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.errors import ConfigError
from cluster.security.private_folder import find_change_by_others
from jobs.pipeline.stage.arguments import arguments
from jobs.pipeline.stage.commands import load_options
from jobs.pipeline.stage.modules import Modules
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


def require_unchangeable(*folders: str | None) -> None:
    """Require that no other user of this machine can change what a run loads: modules and configurations.

    Raises:
        ConfigError: Another user can change a folder, or there is no such folder.
    """
    for folder in folders:
        try:
            problem = None if folder is None else find_change_by_others(Path(folder))
        except OSError as error:
            problem = f"{folder} cannot be read: {error.strerror}"
        if problem is not None:
            raise ConfigError(
                f"A schedule runs code of the folder {folder} with its caller's rights, so no other user may change "
                f"it, but {problem}. Correct that, or apply the schedule in another folder."
            )


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
