"""The stages of a pipeline as a graph. Pure functions over the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from typing import Any

from cluster.errors import suggest_name
from jobs.pipeline.config import PipelineSpec, StageConfig

_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")
_REFERENCE = re.compile(r"\{([a-z][a-z0-9_]*)\.([\w.]+)\}")
_PATTERN = re.compile(r"[*?[]")
_PART = re.compile(r"[a-z]+:(?!//)")
OWN = ("inputs", "outputs")
"""Names that a reference uses for the paths of its own stage, so no stage may have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage, with all stages that it waits for."""

    name: str
    command: str
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    require: dict[str, Any] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    always: bool = False
    title: str = ""
    group: str = ""

    def label(self) -> str:
        """Return the title, or else the name."""
        return self.title or self.name.replace("_", " ")


@dataclass(frozen=True, slots=True)
class Files:
    """Files and folders of a stage."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Graph:
    """Stages in an order in which each follows the stages that it waits for."""

    stages: dict[str, Stage]
    faults: tuple[str, ...] = ()
    """What is wrong, one line each. A graph with faults cannot be run."""

    def sorter(self) -> TopologicalSorter[str]:
        """Return a sorter of the stages' names that was not started yet."""
        return TopologicalSorter({stage.name: stage.after for stage in self.stages.values()})

    def ancestors(self, name: str) -> set[str]:
        """Return the stages that are done before a stage starts."""
        found: set[str] = set()
        queue = list(self.stages[name].after)
        while queue:
            current = queue.pop()
            if current not in found:
                found.add(current)
                queue += self.stages[current].after
        return found

    def direct(self, name: str) -> list[str]:
        """Return the stages that a stage waits for, without those that another one of them waits for already."""
        after = self.stages[name].after
        return [one for one in after if not any(one in self.ancestors(other) for other in after)]

    def groups(self) -> dict[str, list[Stage]]:
        """Return the stages by the name of their group; a stage without a group is a group of its own."""
        groups: dict[str, list[Stage]] = {}
        for stage in self.stages.values():
            groups.setdefault(stage.group or stage.name, []).append(stage)
        return groups

    def layers(self) -> list[list[Stage]]:
        """Return the stages in rows: each stage is one row below the lowest stage that it waits for."""
        row: dict[str, int] = {}
        for stage in self.stages.values():
            row[stage.name] = max((row[name] + 1 for name in stage.after), default=0)
        layers: list[list[Stage]] = [[] for _ in range(max(row.values(), default=-1) + 1)]
        for stage in self.stages.values():
            layers[row[stage.name]].append(stage)
        return layers


def build_graph(spec: PipelineSpec, files: Mapping[str, Files] | None = None) -> Graph:
    """Return the graph of a pipeline's configuration, with the faults of its names, references and cycles.

    Args:
        spec: The configuration.
        files: For each stage, the files that its command reads and writes besides the declared ones.
    """
    configs = {name: config for name, config in spec.stages.items() if config.enabled}
    faults = [
        f"Stage '{name}': a name has small letters, digits and '_', at most 48 characters, and is not one of "
        f"{', '.join(OWN)}. Rename it."
        for name in configs
        if not _NAME.fullmatch(name) or name in OWN
    ]
    if not configs:
        faults.append("The pipeline has no stages. Declare them as `stages: {name: {command: module}}`.")
    for name, config in spec.stages.items():
        faults += [
            f"Stage '{name}': `after` names no stage '{other}'.{suggest_name(other, spec.stages)}"
            for other in config.after
            if other not in spec.stages
        ]
        if config.enabled:
            faults += _reference_faults(name, config, configs)
    paths = {name: _files(config, (files or {}).get(name, Files())) for name, config in configs.items()}
    faults += _shared_outputs(paths)
    stages = {name: _stage(name, config, spec, paths) for name, config in configs.items()}
    graph = Graph(stages, tuple(faults))
    if faults:
        return graph
    try:
        graph.sorter().prepare()
    except CycleError as error:
        return Graph(stages, (f"Stages wait for each other: {' → '.join(reversed(error.args[1]))}.",))
    return Graph({name: stages[name] for name in _in_file_order(graph)})


def references(values: Any) -> Iterator[tuple[str, str]]:
    """Yield the references `{stage.name}` in the texts of nested values, as pairs of stage and name."""
    match values:
        case str():
            yield from _REFERENCE.findall(values)
        case Mapping():
            for value in values.values():
                yield from references(value)
        case list() | tuple():
            for value in values:
                yield from references(value)


def substitute(values: Any, known: Mapping[tuple[str, str], Any]) -> Any:
    """Return nested values with each reference replaced.

    A text that is one reference becomes the value itself, so a number stays a number.

    Raises:
        KeyError: A reference is not known; the argument is the reference's text.
    """
    match values:
        case str():
            whole = _REFERENCE.fullmatch(values)
            if whole:
                return _value(whole, known)
            return _REFERENCE.sub(lambda found: str(_value(found, known)), values)
        case Mapping():
            return {key: substitute(value, known) for key, value in values.items()}
        case list() | tuple():
            return [substitute(value, known) for value in values]
        case _:
            return values


def is_path(name: str) -> bool:
    """Return whether an input or output is a file or folder, and not a part of the platform such as `view:income`."""
    return not _PART.match(name)


def is_pattern(path: str) -> bool:
    """Return whether a path is a pattern with `*`, `?` or `[…]`."""
    return _PATTERN.search(path) is not None


def covers(written: str, read: str) -> bool:
    """Return whether writing a path writes what another path reads: the same path, or a path below it."""
    return read == written or read.startswith(f"{written.rstrip('/')}/")


def touches(written: str, read: str) -> bool:
    """Return whether writing a path changes what reading another one, a folder or a pattern finds."""
    if is_pattern(read):
        return fnmatch(written, read) or covers(written, _PATTERN.split(read)[0].rpartition("/")[0])
    return covers(written, read) or covers(read, written)


def _value(found: re.Match[str], known: Mapping[tuple[str, str], Any]) -> Any:
    key = (found[1], found[2])
    if key not in known:
        raise KeyError(found[0])
    return known[key]


def _reference_faults(name: str, config: StageConfig, configs: Mapping[str, StageConfig]) -> Iterator[str]:
    for other, key in references([config.inputs, config.outputs]):
        yield f"Stage '{name}': {{{other}.{key}}} is in its inputs or outputs. Write a whole path there."
    for other, key in references(config.parameters):
        if other in OWN and key not in getattr(config, other):
            yield f"Stage '{name}': {{{other}.{key}}} is not in its {other}."
        elif other not in OWN and other not in configs:
            yield f"Stage '{name}': {{{other}.{key}}} names no stage.{suggest_name(other, configs)}"


def _files(config: StageConfig, files: Files) -> Files:
    declared = Files(
        tuple(filter(is_path, config.inputs.values())), tuple(filter(is_path, config.outputs.values()))
    )
    return Files(
        tuple(dict.fromkeys(declared.reads + files.reads)),
        tuple(dict.fromkeys(declared.writes + files.writes)),
    )


def _shared_outputs(paths: Mapping[str, Files]) -> Iterator[str]:
    """Yield faults of stages that would replace files of others, or what they read."""
    for name, files in paths.items():
        for path in files.writes:
            yield from (
                f"Stage '{name}' writes {path} and reads {read}, which is moved aside then. Give the output its own "
                "path."
                for read in files.reads
                if touches(path, read)
            )
    written = [(name, path) for name, files in paths.items() for path in files.writes]
    for (name, path), (other, second) in combinations(written, 2):
        if name != other and (covers(path, second) or covers(second, path)):
            both = path if path == second else f"{path} and {second}, of which one is in the other"
            yield f"Stages '{name}' and '{other}' both write {both}. Give each its own path."


def _stage(name: str, config: StageConfig, spec: PipelineSpec, paths: Mapping[str, Files]) -> Stage:
    after = dict.fromkeys(_enabled(config.after, spec))
    after |= {other: None for other, _ in references(config.parameters) if other in paths}
    after |= {
        other: None
        for other, files in paths.items()
        if other != name and any(touches(wrote, read) for wrote in files.writes for read in paths[name].reads)
    }
    return Stage(
        name=name,
        command=config.command,
        parameters=dict(config.parameters),
        inputs=dict(config.inputs),
        outputs=dict(config.outputs),
        after=tuple(after),
        require=dict(config.require),
        code=tuple(config.code),
        always=config.always,
        title=config.title,
        group=config.group,
    )


def _enabled(names: Iterable[str], spec: PipelineSpec) -> Iterator[str]:
    """Yield the stages that are in the pipeline; instead of one that is not, the stages that it waits for."""
    seen: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop(0)
        if name in seen or name not in spec.stages:
            continue
        seen.add(name)
        if spec.stages[name].enabled:
            yield name
        else:
            queue = [*spec.stages[name].after, *queue]


def _in_file_order(graph: Graph) -> Iterator[str]:
    """Yield the stages so that each follows what it waits for, and otherwise in the order of the file."""
    position = {name: number for number, name in enumerate(graph.stages)}
    sorter = graph.sorter()
    sorter.prepare()
    waiting: list[str] = []
    while sorter.is_active():
        waiting = sorted([*waiting, *sorter.get_ready()], key=position.__getitem__)
        name = waiting.pop(0)
        yield name
        sorter.done(name)
