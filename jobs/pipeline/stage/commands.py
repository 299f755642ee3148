"""What Falaj's commands read, write and need permission for, from their configurations.

So a pipeline's file need not repeat it. A user's own command declares its files as inputs and outputs.

A part of the platform is named like a file, with its kind: `view:income`, `service:credit`, `model:loan`,
`online:income` (rows in the online store), `serving:loan` (what serves), `log:loan` (predictions and outcomes).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.entrypoint import PACKAGES, Command, Options
from cluster.errors import ConfigError, RefusedError
from cluster.security.authorization.policy import Action
from cluster.storage import resolve
from feature_jobs.store.catalog.specifications import load_definitions
from feature_jobs.store.definitions.modules import import_module
from feature_jobs.store.definitions.sources import FileSource
from feature_jobs.training_set import manifest_path
from jobs.pipeline.graph import Files
from jobs.pipeline.stage.modules import Modules

_READS = ("training_set", "params_from", "people", "reference", "entities", "manifest")
"""Options of Falaj's commands that name a file to read."""
_WRITES = ("output", "folder")
_ENTRYPOINT = "cluster.entrypoint"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What one command line reads, writes and needs."""

    files: Files = field(default_factory=Files)
    reads: tuple[str, ...] = ()
    """Parts of the platform."""
    writes: tuple[str, ...] = ()
    needs: tuple[tuple[Action, str], ...] = ()
    """Actions that the caller must be permitted, each with the part of the platform."""
    modules: tuple[str, ...] = ()
    """Modules that the configuration names, such as definitions."""
    always: bool = False
    """Whether the command's result depends on the time at which it runs."""


def load_options(module: str) -> Options[Any] | None:
    """Return the options of a command; None for a module that is no command of `cluster.entrypoint.job`.

    Nothing is imported to find the module. If the options are declared in a module of their own, only that module is
    imported, because a command may import Ray and PyTorch. A module that does not use `cluster.entrypoint` is not
    imported, because a plain script could do its work then.

    Raises:
        ConfigError: The module does not exist, or is not Python.
        DefinitionError: The module imports a module that does not exist.
    """
    found = Modules().main(module)
    if found is None:
        raise ConfigError(
            f"No module '{module}'. Run the command in the folder that has it, or add the folder to PYTHONPATH."
        )
    name, path = found
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path} is not valid Python: {error}.") from error
    sources = {
        alias.asname or alias.name: str(node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names
    }
    if sources.get("job") != _ENTRYPOINT:
        return None
    try:
        return _import_options(tree, sources, name)
    except RefusedError:
        raise
    except Exception as error:  # the module is the user's, and an import can do anything
        raise ConfigError(f"'{module}' cannot be imported: {type(error).__name__}: {error}") from error


def _import_options(tree: ast.Module, sources: Mapping[str, str], module: str) -> Options[Any] | None:
    """Import the module that declares a command's options, or else the command's module, and return the options."""
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    match next((function.decorator_list for function in functions), []):
        case [ast.Call(func=ast.Name("job"), args=[ast.Constant(str(config_name)), ast.Name(schema)])] if (
            schema in sources
        ):
            return Options(config_name=config_name, schema=getattr(import_module(sources[schema]), schema))
    main = getattr(import_module(module), "main", None)
    return main.options if isinstance(main, Command) else None


def describe(command: str, config: Any) -> Facts:
    """Return the facts of a command line of one of Falaj's commands; no facts for another command.

    Args:
        command: Module of the command.
        config: The command's configuration.

    Raises:
        RefusedError: The definitions cannot be loaded.
    """
    files = Files(_paths(config, _READS), _paths(config, _WRITES))
    name, version = getattr(config, "name", None), getattr(config, "version", None)
    model, views = f"model:{name}", [f"view:{view}" for view in _views(config)]
    match command:
        case "feature_jobs.apply":
            definitions = load_definitions(config.definitions)
            applied = [f"view:{view}" for view in definitions.views]
            services = [f"service:{service}" for service in definitions.services]
            return Facts(
                writes=(*applied, *services),
                needs=_each(Action.read_metadata if config.plan else Action.apply_definitions, applied),
                modules=(config.definitions,),
            )
        case "feature_jobs.ingest":
            return Facts(
                files=Files(_sources(config)),
                writes=tuple(views),
                needs=_each(Action.write_features, views),
                modules=(config.definitions,),
            )
        case "feature_jobs.materialize":
            online = tuple(f"online:{view}" for view in _views(config))
            return Facts(
                reads=tuple(views),
                writes=online,
                needs=_each(Action.write_features, views),
                always=config.as_of is None,
            )
        case "feature_jobs.compact" | "feature_jobs.retain" | "feature_jobs.replay":
            return Facts(
                reads=tuple(views),
                writes=tuple(views),
                needs=_each(Action.write_features, views),
                always=command == "feature_jobs.retain",
            )
        case "feature_jobs.training_set":
            written = resolve(config.output)
            service = (f"service:{config.service}",) if config.service else ()
            return Facts(
                files=Files(files.reads, (written, manifest_path(written))),
                reads=service,
                needs=_each(Action.build_training_set, service),
            )
        case "jobs.sweep" | "jobs.train":
            actions = [Action.train_model] + [Action.register_model] * (command == "jobs.train")
            family = (config.model or {}).get("module")
            return Facts(
                files=files,
                writes=(model,) if command == "jobs.train" else (),
                needs=tuple((action, model) for action in actions),
                modules=(family,) if family else (),
            )
        case "jobs.evaluate":
            return Facts(files=files, reads=(model,), needs=((Action.register_model, f"{model}/{version}"),))
        case "jobs.monitor":
            return Facts(files=files, reads=(model, f"log:{name}"))
        case "jobs.compact_log":
            return Facts(reads=(model, f"log:{name}"), needs=((Action.compact_log, model),))
        case "jobs.export_model":
            needed = ((Action.export_model, f"{model}/{version}"),)
            return Facts(files=files, reads=(model,), needs=needed)
        case "jobs.import_model":
            return Facts(
                files=Files((resolve(config.file),)), needs=((Action.register_model, "model:imported"),)
            )
        case "serve_apps.deploy":
            return Facts(
                reads=(model,), writes=(f"serving:{name}",), needs=((Action.deploy, f"{model}/{version}"),)
            )
        case "serve_apps.rollout":
            action = config.action.value
            ends = action in ("rollback", "check", "stop_shadow")
            needed = ((Action.rollback if ends else Action.rollout, f"{model}/{version}"),)
            changes = action != "show"
            return Facts(
                files=files,
                reads=(model, f"log:{name}") if action in ("check", "show") else (model,),
                writes=(f"serving:{name}",) if changes else (),
                needs=needed if changes else (),
            )
        case "jobs.pipeline.traffic":
            answers = (resolve(config.answers),)
            return Facts(
                files=Files(files.reads, answers), reads=(model, f"serving:{name}"), writes=(f"log:{name}",)
            )
        case "jobs.pipeline.outcomes":
            read = (*files.reads, resolve(config.answers))
            return Facts(files=Files(read), reads=(model,), writes=(f"log:{name}",))
        case "feature_jobs.census.source" | "cluster.records.nodes":
            return Facts(files=files)
        case _ if command.partition(".")[0] in PACKAGES:
            raise ConfigError(f"{command} cannot be a stage. Run it alone, before or after the pipeline.")
        case _:
            return Facts()


def _paths(config: Any, options: Iterable[str]) -> tuple[str, ...]:
    values = (getattr(config, option, None) for option in options)
    return tuple(resolve(value) for value in values if isinstance(value, str))


def _views(config: Any) -> list[str]:
    setting = getattr(config, "view", None)
    if setting is None:
        return []
    return list(setting) if isinstance(setting, list) else [str(setting)]


def _sources(config: Any) -> tuple[str, ...]:
    """Return the files that an ingestion reads: the file that it names, or else the sources of its views."""
    if config.source.path is not None:
        return (resolve(config.source.path),)
    views = load_definitions(config.definitions).views
    names = list(views) if config.view == "all" else [name for name in _views(config) if name in views]
    sources = (views[name].source for name in names)
    return tuple(resolve(source.path) for source in sources if isinstance(source, FileSource))


def _each(action: Action, parts: Iterable[str]) -> tuple[tuple[Action, str], ...]:
    return tuple((action, part) for part in parts)
