"""`python -m cluster.lineage --model m --version 1`: from which column of which source a model version came.

A pure fold over the ledger: source column, feature, column of the training set, model version, deployment. A view
without a transform takes each feature from the column of its name. What a transform reads cannot be seen from outside:
a field may declare it (`from_columns`), and else it is all columns of the source.

Needs no running cluster; `--format openlineage` gives OpenLineage events, one a line, for tools that read those.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.errors import ModelNotFound, did_you_mean
from cluster.ledger.chain import Entry
from cluster.ledger.events import (
    AliasMoved,
    BatchIngested,
    DeploymentRemoved,
    FeatureViewApplied,
    ModelDeployed,
    ModelRegistered,
    TrainingSetBuilt,
)
from cluster.registry import LATEST

ALL = "*"
"""Stands for all columns of a source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """The way of one column."""

    source: str
    source_columns: tuple[str, ...]
    """`ALL` where a transform does not say what it reads."""
    transform: str | None
    view: str
    view_version: str
    feature: str
    column: str
    """In the training set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTrace:
    """Where one model version came from, and where it went; each step with the ledger entry that says so."""

    model: str
    version: int
    registered: Entry
    built: Entry | None
    """Its training set; none where it was not built by the platform."""
    batches: list[Entry]
    """Ingested into the pinned table versions, in order."""
    columns: list[Column]
    deployments: list[Entry]
    removals: list[Entry]
    """After which it served nobody until it was deployed again."""


@dataclass(slots=True)
class _Seen:
    views: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """Definition by name and version."""
    batches: list[Entry] = field(default_factory=list)
    built: dict[str, Entry] = field(default_factory=dict)
    """By row hash."""
    models: dict[tuple[str, int], tuple[Entry, Entry | None]] = field(default_factory=dict)
    """With the training set as it was known when the version was registered."""
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    """Version by model and alias, as it is now."""
    deployed: list[Entry] = field(default_factory=list)
    removed: list[Entry] = field(default_factory=list)


def trace(entries: Iterable[Entry], model: str, version: int | str) -> ModelTrace:
    """The lineage of a model version, given as a number, an alias, or `LATEST`.

    Raises:
        ModelNotFound: the ledger has no such model, version or alias.
    """
    seen = _read(entries)
    version = _number(seen, model, version)
    registered, built = seen.models[model, version]
    pinned: dict[str, int] = built.payload["table_versions"] if built else {}
    return ModelTrace(
        model=model,
        version=version,
        registered=registered,
        built=built,
        batches=[
            one for one in seen.batches if one.payload["table_version"] <= pinned.get(one.payload["view"], -1)
        ],
        columns=_columns(built, seen.views),
        deployments=_of(seen.deployed, model, version),
        removals=_of(seen.removed, model, version),
    )


def _number(seen: _Seen, model: str, version: int | str) -> int:
    known = sorted(number for name, number in seen.models if name == model)
    if not known:
        raise ModelNotFound(f"No model '{model}'.{did_you_mean(model, {name for name, _ in seen.models})}")
    if isinstance(version, int) or version.isdecimal():
        number = int(version)
    elif version == LATEST:
        number = known[-1]
    elif (model, version) in seen.aliases:
        number = seen.aliases[model, version]
    else:
        aliases = [LATEST, *(alias for name, alias in seen.aliases if name == model)]
        raise ModelNotFound(
            f"Version '{version}' of model '{model}' is neither a number nor an alias.{did_you_mean(version, aliases)}"
        )
    if number not in known:
        raise ModelNotFound(f"Model '{model}' has no version {number}. Known: {', '.join(map(str, known))}.")
    return number


def _of(entries: list[Entry], model: str, version: int) -> list[Entry]:
    return [one for one in entries if (one.payload["name"], one.payload["version"]) == (model, version)]


def source_of(definition: dict[str, Any]) -> str:
    """What a view's source is called: its path, table or topic, never an address that may hold a password."""
    source = definition["source"]
    named = (source.get(name) for name in ("path", "table", "topic"))
    return next((str(name) for name in named if name), f"{definition['name']}'s source")


def describe(found: ModelTrace) -> str:
    """The trace for people."""
    lines = [f"model {found.model} version {found.version}, registered by {found.registered.actor}"]
    if found.built is None:
        lines.append("  its training set was not built by this platform: nothing is known of its columns")
    else:
        said = found.built.payload
        lines.append(
            f"training set {said['output']}, service {said['service']}, rows {said['row_hash'][:16]}"
        )
        lines += [
            f"  {one.column} <- {one.view}.{one.feature} ({one.view_version})"
            f" <- {_said(one)} of {one.source}{f' by {one.transform}' if one.transform else ''}"
            for one in found.columns
        ]
    lines += [
        f"batch {one.payload['ingest_id']} of view {one.payload['view']}: {one.payload['source']}, "
        f"{one.payload['rows_stored']} rows, SHA-256 {one.payload['source_digest'][:16]}"
        for one in found.batches
    ]
    lines += [
        f"deployed as {one.payload['app']}, variant {one.payload['variant']}" for one in found.deployments
    ]
    lines += [f"removed from {one.payload['app']}: {one.payload['reason']}" for one in found.removals]
    return "\n".join(lines)


def as_json(found: ModelTrace) -> dict[str, Any]:
    """The trace as one JSON object; steps by their numbers in the ledger."""
    return {
        "model": found.model,
        "version": found.version,
        "registered": found.registered.seq,
        "training_set": found.built.payload if found.built else None,
        "columns": [asdict(one) for one in found.columns],
        "batches": [one.payload for one in found.batches],
        "deployments": [one.payload for one in found.deployments],
        "removals": [one.payload for one in found.removals],
    }


def _read(entries: Iterable[Entry]) -> _Seen:
    seen = _Seen()
    for entry in entries:
        match entry.event():
            case FeatureViewApplied() as event:
                seen.views[event.view, event.version] = event.definition
            case BatchIngested():
                seen.batches.append(entry)
            case TrainingSetBuilt() as event:
                seen.built[event.row_hash] = entry
            case ModelRegistered() as event:
                built = seen.built.get(event.lineage.get("training_set_hash", ""))
                seen.models[event.name, event.version] = entry, built
            case AliasMoved() as event:
                seen.aliases[event.name, event.alias] = event.version
            case ModelDeployed():
                seen.deployed.append(entry)
            case DeploymentRemoved():
                seen.removed.append(entry)
    return seen


def _columns(built: Entry | None, views: dict[tuple[str, str], dict[str, Any]]) -> list[Column]:
    if built is None:
        return []
    return [
        _column(one, views[view, version], version)
        for view, version in built.payload["view_versions"].items()
        for one in views[view, version]["schema"]
    ]


def _column(one: dict[str, Any], definition: dict[str, Any], version: str) -> Column:
    transform = definition["transform"]
    declared = tuple(one.get("from_columns", ()))
    return Column(
        source=source_of(definition),
        source_columns=declared or ((ALL,) if transform else (one["name"],)),
        transform=transform["name"] if transform else None,
        view=definition["name"],
        view_version=version,
        feature=one["name"],
        column=f"{definition['name']}__{one['name']}",
    )


def _said(one: Column) -> str:
    return "all columns" if one.source_columns == (ALL,) else ", ".join(one.source_columns)
