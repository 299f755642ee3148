"""Check the overrides of a job before it starts.

An override sets one option of the job's command: `key=value`, nothing else of Hydra's syntax. It may not change who
the job is, where the platform's state is, or what Hydra does. It may not read the environment, and it names only
modules and places that are allowed (`modules.py`, `paths.py`). Then the command's own dataclass validates it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from cluster.command_line import quote_texts
from cluster.entrypoint import Options
from cluster.errors import ConfigError
from cluster.host.submission import SubmissionConfig
from cluster.security.private_folder import require_unchangeable
from cluster.settings import PlatformConfig
from jobs.pipeline.stage.commands import load_options
from jobs.pipeline.stage.modules import Modules
from jobs.submission.errors import JobForbidden
from jobs.submission.modules import PIPELINE, require_command, require_library
from jobs.submission.paths import PathRules

MAX_OVERRIDES = 100
MAX_CHARACTERS = 2000
MAX_ALL_CHARACTERS = 10_000
"""Characters of all overrides together. Hydra's parser is slow: it reads about 8,000 characters a second."""
CALLERS_SECTIONS = frozenset({"scaling", "replica"})
"""The platform's sections that a caller may set. They say how much a command uses, within what the cluster has."""
LOADS = "A submitted job"
"""What loads `jobs.config_dir`, for the message of `require_unchangeable`."""
RESERVED = frozenset(field.name for field in fields(PlatformConfig)) - CALLERS_SECTIONS
"""Sections of the platform: tier, identity, storage, ledger, secrets, cluster with its region, and so on."""
_ARGUMENT = re.compile(r"(?P<key>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)=(?P<value>.*)")
_NAME = re.compile(r"[A-Za-z0-9_.]{1,100}")
_CHOICE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_MODULE_OPTIONS = frozenset({"definitions", "module"})
"""Options whose text is the name of a module, at any depth."""
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRules:
    """What the jobs of one installation may be."""

    settings: SubmissionConfig
    paths: PathRules

    def check(self, module: str, overrides: Sequence[str]) -> None:
        """Require that a job may be started.

        Args:
            module: the command's module.
            overrides: its options.

        Raises:
            JobForbidden: no caller may start it.
            ConfigError: the command refuses an option.
            RefusedError: the command's definitions cannot be loaded.
        """
        require_command(module, self.settings.allowed_modules)
        if len(overrides) > MAX_OVERRIDES:
            raise ConfigError(f"A job has at most {MAX_OVERRIDES} overrides, got {len(overrides)}.")
        if (length := sum(map(len, overrides))) > MAX_ALL_CHARACTERS:
            raise ConfigError(
                f"A job's overrides have at most {MAX_ALL_CHARACTERS:,} characters together, got {length:,}. Put long "
                "lists into a file."
            )
        try:
            self._check_overrides(module, overrides)
        except RecursionError:
            raise ConfigError("An override has too many values inside each other.") from None

    def _check_overrides(self, module: str, overrides: Sequence[str]) -> None:
        for argument in overrides:
            self._check_syntax(argument)
        options = load_options(module, Modules())
        if options is None:
            raise ConfigError(f"'{module}' is no command. Its `main` needs the decorator `job`.")
        for override in self._parsed(overrides, options):
            self._check_value(override)
        self._check_folder()
        try:
            config = options.compose(overrides, config_dir=self.settings.config_dir)
        except ConfigError as error:
            if "has no choice" not in str(error) or self.settings.config_dir is not None:
                raise
            raise ConfigError(
                f"{error} For configurations of your own, the operator names their folder with `cluster.up "
                "jobs.config_dir=…`."
            ) from error
        if module == PIPELINE:
            self._check_stages(config)

    def _check_syntax(self, argument: str) -> None:
        """Require a plain `key=value` of an option that is not reserved."""
        match = _ARGUMENT.fullmatch(argument)
        if match is None or not argument.isprintable():
            name = _NAME.match(argument.lstrip("+~-"))
            raise JobForbidden(
                "An override must be `key=value` in one line. A job takes no other arguments: no `+key`, `~key`, "
                "`key@package`, `group/key`, no flags such as `--config-dir`, and no `-m`: submit each point of a "
                "multirun as a job of its own, or use jobs.sweep.",
                rule="syntax",
                option=name[0] if name else "",
            )
        key = match["key"]
        section, _, rest = key.partition(".")
        if len(argument) > MAX_CHARACTERS or _NAME.fullmatch(key) is None:
            raise ConfigError(
                f"An override has at most {MAX_CHARACTERS} characters, and its name at most 100."
            )
        if section == "hydra":
            raise JobForbidden("A job cannot change Hydra's own settings.", rule="hydra", option=key)
        if section in RESERVED:
            raise JobForbidden(
                f"Option '{key}' belongs to the installation or to the caller's token, so a job cannot set it. Leave "
                "it out.",
                rule="reserved",
                option=key,
            )
        if section == "pipeline" and rest:
            raise JobForbidden(
                "A job runs a declared pipeline as it is: `pipeline=<name>`. Its stages are code, so they are changed "
                "in its file.",
                rule="stages",
                option=key,
            )
        if "${" in argument:
            raise JobForbidden(
                f"Option '{key}' has an interpolation `${{…}}`, which could read the head's environment. Give the "
                "value itself.",
                rule="interpolation",
                option=key,
            )

    def _parsed(self, overrides: Sequence[str], options: Options[Any]) -> list[Override]:
        quoted = quote_texts(overrides, options.schema)
        try:
            return OverridesParser.create().parse_overrides(quoted)
        except HydraException as error:
            raise options.composition_error(error) from error

    def _check_value(self, override: Override) -> None:
        key = override.key_or_group
        value = override.value()
        if self._is_group(key) or key == "pipeline":
            if not isinstance(value, str) or not _CHOICE.fullmatch(value):
                raise JobForbidden(
                    f"Option '{key}' must be the name of one of its choices.", rule="choice", option=key
                )
            return
        for name, text in _texts(key, value):
            if "${" in text or not text.isprintable():
                raise JobForbidden(
                    f"Option '{key}' has an interpolation or a control character. Give the value itself.",
                    rule="interpolation",
                    option=key,
                )
            if name.rpartition(".")[2] in _MODULE_OPTIONS:
                require_library(text, self.settings.allowed_modules, option=key)
            else:
                self.paths.check(text, option=key)

    def _is_group(self, key: str) -> bool:
        """Return whether a key selects a file of a group. Otherwise `model=../x` could load any YAML file."""
        folder = self.settings.config_dir
        own = folder is not None and (Path(self.paths.project) / folder / key).is_dir()
        return own or files("configs").joinpath(key).is_dir()

    def _check_folder(self) -> None:
        """Require that only the operator can change the installation's configurations."""
        try:
            require_unchangeable(self.settings.config_dir, loads=LOADS)
        except ConfigError:
            raise JobForbidden(
                "Another user of the head can change the installation's configurations, or they cannot be read. Ask "
                "the operator to correct the folder `jobs.config_dir`.",
                rule="config_dir",
            ) from None

    def _check_stages(self, config: Any) -> None:
        """Require that a job may run every stage of a pipeline."""
        for name, stage in (config.pipeline.stages if config.pipeline is not None else {}).items():
            try:
                require_command(stage.command, self.settings.allowed_modules)
            except JobForbidden:
                raise JobForbidden(
                    f"Stage '{name}' of this pipeline runs a module that no job may run. The operator allows the "
                    "installation's own modules with `cluster.up jobs.allowed_modules=[…]`.",
                    rule="module of a stage",
                    option="pipeline",
                ) from None


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of every text in a value.

    Raises:
        JobForbidden: the value is a sweep, or another form of Hydra's that is no value.
    """
    match value:
        case str():
            yield name, value
        case dict():
            for key, each in value.items():
                yield from _texts(name, key)  # a command could use it as a path
                yield from _texts(f"{name}.{key}", each)
        case list():
            for each in value:
                yield from _texts(name, each)
        case _ if not isinstance(value, _PLAIN):
            raise JobForbidden(
                f"Option '{name}' has several values. Submit a job for each of them, or use jobs.sweep.",
                rule="sweep",
                option=name,
            )
