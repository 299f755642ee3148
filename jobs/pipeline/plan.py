"""Check a whole pipeline before anything runs: its graph, parameters, files, views, models and permissions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cluster.errors import AccessDenied, RefusedError, did_you_mean
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureServiceApplied
from cluster.registry import Registry
from cluster.security.acting import Actor
from cluster.security.authorization.policy import Action, Resource
from cluster.storage import Layout, resolve
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ViewSpec, load_definitions, spec_of, view_specs
from jobs.pipeline.config import PipelineSpec
from jobs.pipeline.graph import Graph, Stage, build_graph, is_path, references, substitute, touches
from jobs.pipeline.stage.arguments import arguments
from jobs.pipeline.stage.columns import column_faults
from jobs.pipeline.stage.commands import Facts, describe, load_options
from jobs.pipeline.stage.content import digest_json, path_exists
from jobs.pipeline.stage.modules import Modules
from jobs.pipeline.stage.requirements import requirement_fault

_NOT_IN_KEY = ("identity", "storage", "ledger", "secrets")
"""Sections that are not part of a stage's key: the caller's identity, and the paths and URLs of state."""
_PLACEHOLDER = "1"
"""While a stage's parameters are checked, this replaces each value of an earlier stage's result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """A stage with what its command reads and writes."""

    stage: Stage
    facts: Facts
    settings: str | None
    """Hash of the composed configuration; None if the module is no command of `cluster.entrypoint.job`."""

    @property
    def is_command(self) -> bool:
        """Whether the module takes the platform's options."""
        return self.settings is not None

    @property
    def reads(self) -> tuple[str, ...]:
        """Files and parts that the stage depends on, declared and known ones."""
        return _unique(*self.stage.inputs.values(), *self.facts.files.reads, *self.facts.reads)

    @property
    def writes(self) -> tuple[str, ...]:
        """Files and parts that the stage changes, declared and known ones."""
        return _unique(*self.stage.outputs.values(), *self.facts.files.writes, *self.facts.writes)

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules whose code the stage depends on."""
        return _unique(self.stage.command, *self.stage.code, *self.facts.modules)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A checked pipeline. With faults, it cannot be run."""

    graph: Graph
    stages: dict[str, PlannedStage]
    faults: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The caller who plans a pipeline, with the options of the command line."""

    ledger: Ledger
    places: Layout
    actor: Actor
    region: str
    options: tuple[str, ...] = ()
    """Arguments of the pipeline's command line that are passed on to each command."""
    config_dir: str | None = None


@dataclass(slots=True)
class Known:
    """Views, services and models that exist when a stage starts."""

    views: dict[str, ViewSpec] = field(default_factory=dict)
    services: dict[str, list[str]] = field(default_factory=dict)
    """Maps service to its views."""
    models: dict[str, str] = field(default_factory=dict)
    """Maps model to the subject that registered its newest version."""


def make_plan(spec: PipelineSpec, caller: Caller) -> Plan:
    """Return the plan of a pipeline, with one line for each fault."""
    faults: list[str] = []
    facts: dict[str, tuple[Facts, str | None]] = {}
    modules = Modules()
    for name, stage in build_graph(spec).stages.items():
        try:
            facts[name] = _facts(stage, caller, modules)
        except RefusedError as error:
            faults.append(f"Stage '{name}': {' '.join(str(error).split())}")
            facts[name] = Facts(), None
        missing = [module for module in stage.code if not modules.exists(module)]
        faults += [f"Stage '{name}': no module '{module}', which `code` names." for module in missing]
    graph = build_graph(_resolved(spec), {name: found.files for name, (found, _) in facts.items()})
    stages = {
        name: PlannedStage(stage=stage, facts=facts[name][0], settings=facts[name][1])
        for name, stage in graph.stages.items()
    }
    faults = [*graph.faults, *faults]
    if not graph.faults:
        known = _known(stages, caller)
        stages = {name: _with_views(planned, known[name]) for name, planned in stages.items()}
        faults += _content_faults(graph, stages, known, caller)
    return Plan(graph=graph, stages=stages, faults=tuple(faults))


def _placeholders(stage: Stage) -> dict[tuple[str, str], Any]:
    """Return a value for each reference of a stage: its own paths, and placeholders for results."""
    values: dict[tuple[str, str], Any] = dict.fromkeys(
        references([stage.parameters, stage.inputs, stage.outputs]), _PLACEHOLDER
    )
    return values | own_paths(stage)


def own_paths(stage: Stage) -> dict[tuple[str, str], Any]:
    """Return the values of `{inputs.…}` and `{outputs.…}`."""
    return {("inputs", name): path for name, path in stage.inputs.items()} | {
        ("outputs", name): path for name, path in stage.outputs.items()
    }


def _facts(stage: Stage, caller: Caller, modules: Modules) -> tuple[Facts, str | None]:
    """Return the facts of a stage's command, after a check of its parameters, and the hash of its configuration.

    Raises:
        RefusedError: The module does not exist, or a parameter is invalid.
    """
    options = load_options(stage.command, modules)
    if options is None:
        return Facts(), None
    values = substitute(stage.parameters, _placeholders(stage))
    config = options.compose([*caller.options, *arguments(values)], config_dir=caller.config_dir)
    settings = {key: value for key, value in asdict(config).items() if key not in _NOT_IN_KEY}
    return describe(stage.command, config, modules), digest_json(settings)


def _resolved(spec: PipelineSpec) -> PipelineSpec:
    """Return the same pipeline with absolute paths, so that equal paths have equal names."""
    for stage in spec.stages.values():
        for files in (stage.inputs, stage.outputs):
            files |= {name: resolve(path) if is_path(path) else path for name, path in files.items()}
    return spec


def _known(stages: Mapping[str, PlannedStage], caller: Caller) -> dict[str, Known]:
    """Return what exists when each stage starts."""
    first = _recorded(caller)
    before: dict[str, Known] = {}
    after: dict[str, Known] = {}
    for name, planned in stages.items():
        before[name] = _merge([first, *(after[other] for other in planned.stage.after)])
        after[name] = _merge([before[name], _made(planned, caller)])
    return before


def _with_views(planned: PlannedStage, known: Known) -> PlannedStage:
    """Return a stage that also reads each view behind `view:all`, and behind a service whose rows it joins."""
    facts = planned.facts
    reads = [f"view:{view}" for part in facts.reads if part == "view:all" for view in known.views]
    if planned.stage.command == "feature_jobs.training_set":
        services = [part.partition(":")[2] for part in facts.reads if part.startswith("service:")]
        reads += [f"view:{view}" for service in services for view in known.services.get(service, [])]
    return replace(planned, facts=replace(facts, reads=_unique(*facts.reads, *reads)))


def _content_faults(
    graph: Graph, stages: Mapping[str, PlannedStage], known: Mapping[str, Known], caller: Caller
) -> Iterator[str]:
    """Yield faults of files, parts, permissions and requirements, in the order in which the stages run."""
    for name, planned in stages.items():
        ancestors = graph.ancestors(name)
        earlier = [stages[other].stage for other in ancestors]
        written = [path for other in ancestors for path in stages[other].writes if is_path(path)]
        messages = [
            *_missing_files(planned, written),
            *_unknown_parts(planned, known[name]),
            *_denied(planned, known[name], caller),
            *column_faults(planned.stage, earlier, known[name].views, known[name].services),
            *(
                requirement_fault(key, value, single=planned.facts.single)
                or (planned.facts.results.fault(key) if planned.facts.results else "")
                for key, value in planned.stage.require.items()
            ),
        ]
        yield from (f"Stage '{name}': {message}" for message in messages if message)


def _recorded(caller: Caller) -> Known:
    registry = Registry(caller.ledger, caller.places)
    services = {
        entry.payload["service"]: list(entry.payload["view_order"])
        for entry in caller.ledger.entries(FeatureServiceApplied)
    }
    models = {name: registry.get(name, "latest").registered_by for name in registry.names()}
    return Known(view_specs(caller.ledger), services, models)


def _made(planned: PlannedStage, caller: Caller) -> Known:
    """Return what a stage adds: applied definitions, and the models that it writes."""
    made = Known()
    if planned.stage.command == "feature_jobs.apply" and planned.facts.modules:
        definitions = load_definitions(planned.facts.modules[0])
        made.views = {name: spec_of(view) for name, view in definitions.views.items()}
        made.services = {
            name: [view.name for view in service.views] for name, service in definitions.services.items()
        }
    for part in planned.writes:
        kind, _, name = part.partition(":")
        if kind == "model":
            made.models[name] = caller.actor.name
    return made


def _merge(parts: list[Known]) -> Known:
    merged = Known()
    for part in parts:
        merged.views |= part.views
        merged.services |= part.services
        merged.models |= part.models
    return merged


def _missing_files(planned: PlannedStage, written: list[str]) -> Iterator[str]:
    for path in filter(is_path, planned.reads):
        if not any(touches(output, path) for output in written) and not path_exists(path):
            yield f"{path} does not exist, and no earlier stage writes it."


def _unknown_parts(planned: PlannedStage, known: Known) -> Iterator[str]:
    names: dict[str, Mapping[str, Any]] = {
        "view": known.views,
        "service": known.services,
        "model": known.models,
    }
    parts = [part for part in planned.reads if not is_path(part)]
    if planned.stage.command != "feature_jobs.apply":
        parts += [part for part in planned.facts.writes if part.startswith("view:")]
    for part in dict.fromkeys(parts):
        kind, _, name = part.partition(":")
        name = name.partition("/")[0]
        if kind in names and name != "all" and name not in names[kind]:
            yield f"unknown {kind} '{name}', and no earlier stage makes it.{did_you_mean(name, names[kind])}"


def _denied(planned: PlannedStage, known: Known, caller: Caller) -> Iterator[str]:
    actor = caller.actor
    for action, part in planned.facts.needs:
        for resource in _resources(part, known, caller, action=action):
            try:
                actor.policy.check(actor.principal, action, resource, environment=actor.environment)
            except AccessDenied as error:
                yield str(error)
                break


def _resources(part: str, known: Known, caller: Caller, *, action: Action) -> Iterator[Resource]:
    """Yield the resources that the policies decide on. An unknown name yields none; `_unknown_parts` reports it."""
    kind, _, name = part.partition(":")
    match kind:
        case "view" if action in (Action.apply_definitions, Action.read_metadata):
            region = known.views[name].region if name in known.views else None
            yield Resource(kind="feature view", name=name, region=region or caller.region)
        case "view":
            views = known.views if name == "all" else [name]
            for view in views:
                if view in known.views:
                    yield from view_resources(known.views[view], region=caller.region)
        case "service":
            for view in known.services.get(name, []):
                if view in known.views:
                    yield from view_resources(known.views[view], region=caller.region)
        case "model":
            model = name.partition("/")[0]
            registrant = known.models.get(model, "")
            yield Resource(kind="model", name=model, region=caller.region, registered_by=registrant)


def _unique(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
