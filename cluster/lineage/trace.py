"""Trace a model version through the ledger: source column, feature, training-set column, model version, deployment.

`trace_model` is a pure function of the entries that `read_entries` finds. Neither needs a running cluster. A view
without a transform takes each feature from the source column of the same name. If there is a transform, a field can
declare the source columns of the feature (`from_columns`). Without a declaration, the lineage has all source columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from cluster.errors import LedgerCorrupt, ModelNotFound, did_you_mean
from cluster.ledger import Ledger
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
    """Lineage of one column of a training set."""

    source: str
    source_columns: tuple[str, ...]
    """`(ALL,)` if a transform does not declare the columns that it reads."""
    transform: str | None
    view: str
    view_version: str
    feature: str
    column: str
    """Name of the column in the training set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTrace:
    """Lineage of one model version, with the ledger entry of each step."""

    model: str
    version: int
    registered: Entry
    training_set: Entry | None
    """Entry of the version's training set; None if Falaj did not build the training set."""
    batches: list[Entry]
    """Batches in the table versions that the training set was built from, in order."""
    columns: list[Column]
    deployments: list[Entry]
    removals: list[Entry]
    """Removals of the version's Serve application."""


class _Registration(NamedTuple):
    registered: Entry
    training_set: Entry | None
    """Newest entry of the training set before the registration; None if Falaj did not build the training set."""


@dataclass(slots=True)
class _History:
    """The ledger's entries that matter for lineage, by kind."""

    views: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """Definition by view name and version."""
    batches: list[Entry] = field(default_factory=list)
    training_sets: dict[str, Entry] = field(default_factory=dict)
    """Entry by row hash."""
    models: dict[tuple[str, int], _Registration] = field(default_factory=dict)
    """Registration by model name and version."""
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    """Current version by model name and alias."""
    deployed: list[Entry] = field(default_factory=list)
    removed: list[Entry] = field(default_factory=list)


def read_entries(ledger: Ledger, model: str, version: int | str) -> list[Entry]:
    """Find the entries of a model version's lineage with the event index, and return them in order.

    From these entries, `trace_model` computes the same result as from all entries of the ledger.
    """
    registered = list(ledger.find(ModelRegistered, name=model))
    if not registered:  # for the message that names similar models
        return list(ledger.entries(ModelRegistered))
    entries = [*registered]
    if isinstance(version, str) and not version.isdecimal() and version != LATEST:
        moved = ledger.newest(AliasMoved, name=model, alias=version)
        entries += [moved] if moved else ledger.find(AliasMoved, name=model)
    try:
        number = _number(_read(sorted(entries, key=_seq)), model, version)
    except ModelNotFound:
        return sorted(entries, key=_seq)
    of_version: dict[str, Any] = {"name": model, "version": number}
    entries += [*ledger.find(ModelDeployed, **of_version), *ledger.find(DeploymentRemoved, **of_version)]
    for entry in registered:
        if entry.payload["version"] == number:
            entries += _training_data(ledger, entry)
    return sorted(entries, key=_seq)


def _training_data(ledger: Ledger, registered: Entry) -> Iterator[Entry]:
    """Yield a version's training set, and the definitions and batches of its views."""
    row_hash = registered.payload["lineage"].get("training_set_hash", "")
    built = list(ledger.find(TrainingSetBuilt, row_hash=row_hash))
    yield from built
    for view in {view for entry in built for view in entry.payload["view_versions"]}:
        yield from ledger.find(FeatureViewApplied, view=view)
        yield from ledger.find(BatchIngested, view=view)


def _seq(entry: Entry) -> int:
    return entry.seq


def trace_model(entries: Iterable[Entry], model: str, version: int | str) -> ModelTrace:
    """Return the lineage of a model version.

    Args:
        entries: The entries of `read_entries`, or all entries of the ledger.
        model: Name of the model.
        version: A number, an alias, or `LATEST`.

    Raises:
        ModelNotFound: The ledger has no such model, version or alias.
        LedgerCorrupt: The ledger lacks a view version that the training set was built from.
    """
    history = _read(entries)
    version = _number(history, model, version)
    registration = history.models[model, version]
    built = registration.training_set
    table_versions: dict[str, int] = built.payload["table_versions"] if built else {}
    return ModelTrace(
        model=model,
        version=version,
        registered=registration.registered,
        training_set=built,
        batches=[
            batch
            for batch in history.batches
            if batch.payload["table_version"] <= table_versions.get(batch.payload["view"], -1)
        ],
        columns=_columns(built, history.views),
        deployments=_entries_of(history.deployed, model, version),
        removals=_entries_of(history.removed, model, version),
    )


def _number(history: _History, model: str, version: int | str) -> int:
    known = sorted(number for name, number in history.models if name == model)
    if not known:
        raise ModelNotFound(f"No model '{model}'.{did_you_mean(model, {name for name, _ in history.models})}")
    if isinstance(version, int) or version.isdecimal():
        number = int(version)
    elif version == LATEST:
        number = known[-1]
    elif (model, version) in history.aliases:
        number = history.aliases[model, version]
    else:
        aliases = [LATEST, *(alias for name, alias in history.aliases if name == model)]
        raise ModelNotFound(
            f"Version '{version}' of model '{model}' is neither a number nor an alias.{did_you_mean(version, aliases)}"
        )
    if number not in known:
        raise ModelNotFound(f"Model '{model}' has no version {number}. Known: {', '.join(map(str, known))}.")
    return number


def _entries_of(entries: list[Entry], model: str, version: int) -> list[Entry]:
    return [
        entry for entry in entries if (entry.payload["name"], entry.payload["version"]) == (model, version)
    ]


def source_name(definition: dict[str, Any]) -> str:
    """Return a name for a view's source: its path, table or topic. A URL is never used: it may contain a password."""
    source = definition["source"]
    names = (source.get(key) for key in ("path", "table", "topic"))
    return next((str(name) for name in names if name), f"{definition['name']}'s source")


def describe(trace: ModelTrace) -> str:
    """Return the lineage as text."""
    lines = [f"model {trace.model} version {trace.version}, registered by {trace.registered.actor}"]
    origin = trace.registered.payload.get("origin", {})
    if origin:
        lines.append(
            f"imported: version {origin['version']} of '{origin['installation']}', registered there by "
            f"{origin['registered_by']} at {origin['registered_at']} (event {origin['entry_hash'][:16]})"
        )
    sweep = trace.registered.payload["lineage"].get("sweep")
    if sweep:
        lines.append(f"hyper-parameters of trial {sweep['trial']} of sweep {sweep['run']}")
    if trace.training_set is not None:
        built = trace.training_set.payload
        lines.append(
            f"training set {built['output']}, service {built['service']}, rows {built['row_hash'][:16]}"
        )
        lines += [f"  {_describe_column(column)}" for column in trace.columns]
    elif not origin:
        lines.append(
            "  its training set was not built by this platform: the lineage of its columns is unknown"
        )
    lines += [
        f"batch {batch['ingest_id']} of view {batch['view']}: {batch['source']}, "
        f"{batch['rows_stored']} rows, SHA-256 {batch['source_digest'][:16]}"
        for batch in _payloads(trace.batches)
    ]
    lines += [
        f"deployed as {event['app']}, variant {event['variant']}" for event in _payloads(trace.deployments)
    ]
    lines += [f"removed from {event['app']}: {event['reason']}" for event in _payloads(trace.removals)]
    return "\n".join(lines)


def as_json(trace: ModelTrace) -> dict[str, Any]:
    """Return the lineage as one JSON object."""
    return {
        "model": trace.model,
        "version": trace.version,
        "registered": trace.registered.seq,
        "origin": trace.registered.payload.get("origin", {}),
        "sweep": trace.registered.payload["lineage"].get("sweep", {}),
        "training_set": trace.training_set.payload if trace.training_set else None,
        "columns": [asdict(column) for column in trace.columns],
        "batches": _payloads(trace.batches),
        "deployments": _payloads(trace.deployments),
        "removals": _payloads(trace.removals),
    }


def _payloads(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    return [entry.payload for entry in entries]


def _read(entries: Iterable[Entry]) -> _History:
    history = _History()
    for entry in entries:
        match entry.event():
            case FeatureViewApplied() as event:
                history.views[event.view, event.version] = event.definition
            case BatchIngested():
                history.batches.append(entry)
            case TrainingSetBuilt() as event:
                history.training_sets[event.row_hash] = entry
            case ModelRegistered() as event:
                built = history.training_sets.get(event.lineage.get("training_set_hash", ""))
                history.models[event.name, event.version] = _Registration(entry, built)
            case AliasMoved() as event:
                history.aliases[event.name, event.alias] = event.version
            case ModelDeployed():
                history.deployed.append(entry)
            case DeploymentRemoved():
                history.removed.append(entry)
    return history


def _columns(built: Entry | None, views: dict[tuple[str, str], dict[str, Any]]) -> list[Column]:
    if built is None:
        return []
    return [
        _column(view_field, definition, version)
        for view, version in built.payload["view_versions"].items()
        for definition in (_definition(views, view, version, built),)
        for view_field in definition["schema"]
    ]


def _definition(
    views: dict[tuple[str, str], dict[str, Any]], view: str, version: str, built: Entry
) -> dict[str, Any]:
    if (view, version) not in views:
        raise LedgerCorrupt(
            f"Event {built.seq} names version {version} of feature view '{view}', but no event defines that version. "
            "Check the ledger with `python -m cluster.ledger verify`, and restore it from a backup.",
            seq=built.seq,
        )
    return views[view, version]


def _column(view_field: dict[str, Any], definition: dict[str, Any], version: str) -> Column:
    transform, feature = definition["transform"], view_field["name"]
    declared = tuple(view_field.get("from_columns", ()))
    return Column(
        source=source_name(definition),
        source_columns=declared or ((ALL,) if transform else (feature,)),
        transform=transform["name"] if transform else None,
        view=definition["name"],
        view_version=version,
        feature=feature,
        column=f"{definition['name']}__{feature}",
    )


def _describe_column(column: Column) -> str:
    sources = "all columns" if column.source_columns == (ALL,) else ", ".join(column.source_columns)
    transform = f" by {column.transform}" if column.transform else ""
    return (
        f"{column.column} <- {column.view}.{column.feature} ({column.view_version})"
        f" <- {sources} of {column.source}{transform}"
    )
