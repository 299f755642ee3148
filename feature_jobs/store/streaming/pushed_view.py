"""Load the view that checks pushed rows, by its name alone.

A view without a transform is data, so its record in the ledger is enough. A view with a transform needs its code. It
must be the code that was applied, because other code would make other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cluster.errors import DefinitionError, FeatureViewNotFound, did_you_mean
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureViewApplied
from feature_jobs.store.catalog.lifecycle import read_lifecycles, require_not_retired
from feature_jobs.store.catalog.specifications import ViewSpec, load_definitions, view_spec
from feature_jobs.store.definitions.aggregations import Aggregation
from feature_jobs.store.definitions.checks import Check
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.definitions.views import Entity, FeatureView, Field, FileSource, Sensitivity


@dataclass(frozen=True, kw_only=True, slots=True)
class PushedView:
    """A view as a definition and as a specification."""

    view: FeatureView
    """The definition, which checks rows."""
    spec: ViewSpec
    """The specification, by which rows are stored and read."""


def load_pushed_view(ledger: Ledger, name: str) -> PushedView:
    """Load the newest version of an applied view.

    Raises:
        FeatureViewNotFound: no view of that name was applied.
        ViewRetired: the view is retired and accepts no new rows.
        DefinitionError: the transform's code cannot be imported here, or is not the applied code.
    """
    applied = ledger.newest(FeatureViewApplied, view=name)
    if applied is None:
        known = {entry.payload["view"] for entry in ledger.entries(FeatureViewApplied)}
        raise FeatureViewNotFound(
            f"No feature view '{name}' has been applied.", hint=did_you_mean(name, known)
        )
    require_not_retired(read_lifecycles(ledger), [name], doing="No new rows are taken.")
    newest = applied.payload
    definition, version = newest["definition"], newest["version"]
    if definition["transform"] is None:
        view = view_from_definition(definition)
    else:
        view = _from_code(
            name, version, newest.get("module") or definition["transform"]["name"].split(":")[0]
        )
    return PushedView(view=view, spec=view_spec(ledger, name))


def _from_code(name: str, version: str, module: str) -> FeatureView:
    try:
        view = load_definitions(module).view(name)
    except DefinitionError as error:
        raise DefinitionError(
            f"View '{name}' has a transform, and its code cannot be imported: {error.public} Start from a folder or an "
            f"environment that has the module '{module}' that it was applied from."
        ) from error
    if view.version != version:
        raise DefinitionError(
            f"View '{name}' was applied as version {version}, but the module '{module}' has version {view.version}. "
            "Apply the view, or install the applied code."
        )
    return view


def view_from_definition(definition: dict[str, Any]) -> FeatureView:
    """Return a view without a transform from its definition in the ledger."""
    checks: dict[str, Any] = {check.__name__: check for check in _subclasses(Check)}
    return FeatureView(
        definition["name"],
        entities=[_entity(entity) for entity in definition["entities"]],
        source=_source(definition["source"]),
        schema=[
            Field(field["name"], field["dtype"], sensitivity=Sensitivity(field["sensitivity"]))
            for field in definition["schema"]
        ],
        created_lag=timedelta(seconds=definition["created_lag_s"]),
        checks=[checks[check["check"]].from_definition(check) for check in definition["checks"]],
        event_id=definition.get("event_id"),
        aggregations=[
            Aggregation(
                output["column"], output["function"], windows=[timedelta(microseconds=output["window_us"])]
            )
            for output in definition.get("aggregations", ())
        ],
    )


def _entity(recorded: dict[str, Any]) -> Entity:
    names, types = recorded["join_keys"], recorded.get("key_types")
    return Entity(recorded["name"], join_keys={key: types[key] for key in names} if types else names)


def _source(recorded: dict[str, Any]) -> FileSource | KafkaSource:
    path, event = recorded.get("path") or "pushed", recorded["event_timestamp"]
    others: dict[str, Any] = {name: recorded.get(name) for name in ("created_timestamp", "deleted", "zone")}
    if path.startswith("kafka://"):
        servers, _, topic = path.removeprefix("kafka://").partition("/")
        return KafkaSource(servers, topic, event_timestamp=event, **others)
    return FileSource(path, event_timestamp=event, **others)


def _subclasses(base: type) -> Iterator[type]:
    subclass: type
    for subclass in base.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
