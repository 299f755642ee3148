"""What Falaj's commands read, write and need permission for, from their configurations.

So a pipeline's file need not repeat it. A user's own command declares its files as inputs and outputs.

A part of the platform is named like a file, with its kind: `view:income`, `service:credit`, `model:loan`,
`online:income` (rows in the online store), `serving:loan` (what serves), `log:loan` (predictions and outcomes).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
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
from jobs.pipeline.stage.results import RESULTS, Results, returned

_READS = (
    "training_set",
    "params_from",
    "people",
    "reference",
    "entities",
    "manifest",
    "input",
    "predictions",
    "artifact",
)
"""Options of Falaj's commands that name a file to read."""
_WRITES = ("output", "folder", "report")
_SINGLE_WITH_SLICES = frozenset(
    {"name", "version", "family", "data_hash", "rows", "chosen_rows", "column", "value"}
)
"""Names of the result of `jobs.evaluate` that its slices do not repeat, or that are also values of the whole."""
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
    single: frozenset[str] | None = None
    """Names without dots that each stand for one value of the result. A requirement must write every other name as a
    whole, such as `metrics.auc`. None if each name may be short, or if the names are not known."""
    results: Results | None = None
    """Names of the result; None if they are not known."""


def load_options(module: str, modules: Modules) -> Options[Any] | None:
    """Return the options of a command; None for a module that is no command of `cluster.entrypoint.job`.

    Nothing is imported to find the module. If the options are declared in a module of their own, only that module is
    imported, because a command may import Ray and PyTorch. A module that does not use `cluster.entrypoint` is not
    imported, because a plain script could do its work then.

    Args:
        module: Module of the command.
        modules: Finds the module's source.

    Raises:
        ConfigError: The module does not exist, or is not Python.
        DefinitionError: The module imports a module that does not exist.
    """
    found = modules.main(module)
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


def describe(command: str, config: Any, modules: Modules) -> Facts:
    """Return the facts of a command line of one of Falaj's commands; of another command, only the names of its result.

    Args:
        command: Module of the command.
        config: The command's configuration.
        modules: Finds the source of a user's command.

    Raises:
        RefusedError: The definitions cannot be loaded.
        ConfigError: The command is Falaj's, and cannot be a stage.
    """
    facts = _FACTS.get(command)
    if facts is not None:
        return replace(facts(config), results=RESULTS.get(command))
    if command.partition(".")[0] in PACKAGES:
        raise ConfigError(f"{command} cannot be a stage. Run it alone, before or after the pipeline.")
    return Facts(results=_returned(command, modules))


def _returned(command: str, modules: Modules) -> Results | None:
    """Return the names of the result of a user's own command, as its source shows them."""
    found = modules.main(command)
    return None if found is None else returned(ast.parse(found[1].read_bytes(), str(found[1])))


def _apply(config: Any) -> Facts:
    definitions = load_definitions(config.definitions)
    views = [f"view:{view}" for view in definitions.views]
    services = [f"service:{service}" for service in definitions.services]
    return Facts(
        writes=(*views, *services),
        needs=_each(Action.read_metadata if config.plan else Action.apply_definitions, views),
        modules=(config.definitions,),
    )


def _ingest(config: Any) -> Facts:
    views = _views(config)
    return Facts(
        files=Files(_sources(config)),
        writes=views,
        needs=_each(Action.write_features, views),
        modules=(config.definitions,),
    )


def _materialize(config: Any) -> Facts:
    views = _views(config)
    return Facts(
        reads=views,
        writes=tuple(f"online:{name}" for name in _view_names(config)),
        needs=_each(Action.write_features, views),
        always=config.as_of is None,
    )


def _rewrite(config: Any) -> Facts:
    views = _views(config)
    return Facts(reads=views, writes=views, needs=_each(Action.write_features, views))


def _retain(config: Any) -> Facts:
    return replace(_rewrite(config), always=True)


def _training_set(config: Any) -> Facts:
    output = resolve(config.output)
    service = (f"service:{config.service}",) if config.service else ()
    return Facts(
        files=Files(_files(config).reads, (output, manifest_path(output))),
        reads=service,
        needs=_each(Action.build_training_set, service),
    )


def _sweep(config: Any) -> Facts:
    return _train(config) if config.register else _fit(config)


def _fit(config: Any) -> Facts:
    family = (config.model or {}).get("module")
    return Facts(
        files=_files(config),
        needs=((Action.train_model, _model(config)),),
        modules=(family,) if family else (),
    )


def _train(config: Any) -> Facts:
    model, facts = _model(config), _fit(config)
    return replace(facts, writes=(model,), needs=(*facts.needs, (Action.register_model, model)))


def _evaluate(config: Any) -> Facts:
    needs = ((Action.register_model, _version(config)),)
    # Each slice has every metric. `column` and `value` are those of the smallest slice.
    single = _SINGLE_WITH_SLICES if config.slices else None
    return Facts(files=_files(config), reads=(_model(config),), needs=needs, single=single)


def _monitor(config: Any) -> Facts:
    return Facts(files=_files(config), reads=(_model(config), _log(config)))


def _score(config: Any) -> Facts:
    # The model's signature, which is not read here, names the feature service.
    reads_features = config.inputs_from.value != "given"
    needs = ((Action.predict, _model(config)),)
    return Facts(files=_files(config), reads=(_model(config),), needs=needs, always=reads_features)


def _compact_log(config: Any) -> Facts:
    model = _model(config)
    return Facts(reads=(model, _log(config)), needs=((Action.compact_log, model),))


def _export_model(config: Any) -> Facts:
    needs = ((Action.export_model, _version(config)),)
    return Facts(files=_files(config), reads=(_model(config),), needs=needs)


def _import_model(config: Any) -> Facts:
    # The model's name is in the bundle, so the permission is checked with a placeholder.
    return Facts(files=Files((resolve(config.file),)), needs=((Action.register_model, "model:imported"),))


def _register(config: Any) -> Facts:
    model = _model(config)
    return Facts(files=_files(config), writes=(model,), needs=((Action.register_model, model),))


def _deploy(config: Any) -> Facts:
    needs = ((Action.deploy, _version(config)),)
    return Facts(reads=(_model(config),), writes=(_serving(config),), needs=needs)


def _rollout(config: Any) -> Facts:
    action, model = config.action.value, _model(config)
    reads = (model, _log(config)) if action in ("check", "compare", "show") else (model,)
    if action in ("compare", "show"):
        return Facts(files=_files(config), reads=reads)
    needed = Action.rollback if action in ("rollback", "check", "stop_shadow") else Action.rollout
    return Facts(
        files=_files(config),
        reads=reads,
        writes=(_serving(config),),
        needs=((needed, _version(config)),),
    )


def _traffic(config: Any) -> Facts:
    return Facts(
        files=Files(_files(config).reads, (resolve(config.answers),)),
        reads=(_model(config), _serving(config)),
        writes=(_log(config),),
    )


def _outcomes(config: Any) -> Facts:
    return Facts(
        files=Files((*_files(config).reads, resolve(config.answers))),
        reads=(_model(config),),
        writes=(_log(config),),
    )


def _only_files(config: Any) -> Facts:
    return Facts(files=_files(config))


_FACTS: dict[str, Callable[[Any], Facts]] = {
    "cluster.records.nodes": _only_files,
    "feature_jobs.apply": _apply,
    "feature_jobs.census.source": _only_files,
    "feature_jobs.compact": _rewrite,
    "feature_jobs.ingest": _ingest,
    "feature_jobs.materialize": _materialize,
    "feature_jobs.replay": _rewrite,
    "feature_jobs.retain": _retain,
    "feature_jobs.training_set": _training_set,
    "jobs.compact_log": _compact_log,
    "jobs.evaluate": _evaluate,
    "jobs.export_model": _export_model,
    "jobs.import_model": _import_model,
    "jobs.monitor": _monitor,
    "jobs.pipeline.outcomes": _outcomes,
    "jobs.pipeline.traffic": _traffic,
    "jobs.register": _register,
    "jobs.score": _score,
    "jobs.sweep": _sweep,
    "jobs.train": _train,
    "serve_apps.deploy": _deploy,
    "serve_apps.rollout": _rollout,
}
"""For each command that can be a stage, the function that returns its facts."""
STAGE_COMMANDS = frozenset(_FACTS)
"""The platform's commands that can be a stage."""
WITH_RUNS = frozenset({"jobs.sweep", "jobs.train"})
"""Commands whose option `run=<id>` continues the work of a killed job that had the same id."""


def _model(config: Any) -> str:
    return f"model:{config.name}"


def _version(config: Any) -> str:
    return f"model:{config.name}/{config.version}"


def _log(config: Any) -> str:
    return f"log:{config.name}"


def _serving(config: Any) -> str:
    return f"serving:{config.name}"


def _files(config: Any) -> Files:
    return Files(_paths(config, _READS), _paths(config, _WRITES))


def _paths(config: Any, options: Iterable[str]) -> tuple[str, ...]:
    values = (getattr(config, option, None) for option in options)
    return tuple(resolve(value) for value in values if isinstance(value, str))


def _view_names(config: Any) -> list[str]:
    return list(config.view) if isinstance(config.view, list) else [str(config.view)]


def _views(config: Any) -> tuple[str, ...]:
    return tuple(f"view:{name}" for name in _view_names(config))


def _sources(config: Any) -> tuple[str, ...]:
    """Return the files that an ingestion reads: the file that it names, or else the sources of its views."""
    if config.source.path is not None:
        return (resolve(config.source.path),)
    views = load_definitions(config.definitions).views
    names = list(views) if config.view == "all" else [name for name in _view_names(config) if name in views]
    sources = (views[name].source for name in names)
    return tuple(resolve(source.path) for source in sources if isinstance(source, FileSource))


def _each(action: Action, parts: Iterable[str]) -> tuple[tuple[Action, str], ...]:
    return tuple((action, part) for part in parts)
