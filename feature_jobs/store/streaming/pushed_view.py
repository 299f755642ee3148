"""The view that pushed rows are checked by, found without anybody naming its module.

A view without a transform is data, so the ledger's record of it is enough. One with a transform needs its code, which
must be the code that was applied: rows that a stranger's code made would not be the view's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cluster.errors import DefinitionError, FeatureViewNotFound, did_you_mean
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureViewApplied
from feature_jobs.store.catalog.lifecycle import heed, read_lifecycles
from feature_jobs.store.catalog.specifications import ViewSpec, load_definitions, view_spec
from feature_jobs.store.definitions.aggregations import Aggregation
from feature_jobs.store.definitions.checks import Check
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.definitions.views import Entity, FeatureView, Field, FileSource, Sensitivity


@dataclass(frozen=True, kw_only=True, slots=True)
class PushedView:
    """A view as rows are checked by it, and as they are stored and read."""

    view: FeatureView
    spec: ViewSpec


def pushed_view(ledger: Ledger, name: str) -> PushedView:
    """The newest version of an applied view.

    Raises:
        FeatureViewNotFound: no view of that name was applied.
        ViewRetired: it takes no new rows.
        DefinitionError: its transform's code cannot be imported here, or is not what was applied.
    """
    applied = [entry.payload for entry in ledger.entries(FeatureViewApplied)]
    of_name = [payload for payload in applied if payload["view"] == name]
    if not of_name:
        known = {payload["view"] for payload in applied}
        raise FeatureViewNotFound(
            f"No feature view '{name}' has been applied.", hint=did_you_mean(name, known)
        )
    heed(read_lifecycles(ledger), [name], doing="No new rows are taken.")
    newest = of_name[-1]
    definition, version = newest["definition"], newest["version"]
    if definition["transform"] is None:
        view = from_record(definition)
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
            f"View '{name}' has a transform, whose code is not here: {error.public} Start from a folder or an "
            f"environment that has the module '{module}' it was applied from."
        ) from error
    if view.version != version:
        raise DefinitionError(
            f"View '{name}' was applied as version {version}, the module '{module}' here has {view.version}. Apply it, "
            "or bring the applied code here."
        )
    return view


def from_record(definition: dict[str, Any]) -> FeatureView:
    """A view without a transform, from the ledger's record of it."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in _subclasses(Check)}
    return FeatureView(
        definition["name"],
        entities=[_entity(one) for one in definition["entities"]],
        source=_source(definition["source"]),
        schema=[
            Field(one["name"], one["dtype"], sensitivity=Sensitivity(one["sensitivity"]))
            for one in definition["schema"]
        ],
        created_lag=timedelta(seconds=definition["created_lag_s"]),
        checks=[kinds[check["check"]].from_definition(check) for check in definition["checks"]],
        event_id=definition.get("event_id"),
        aggregations=[
            Aggregation(one["column"], one["function"], windows=[timedelta(microseconds=one["window_us"])])
            for one in definition.get("aggregations", ())
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


def _subclasses(kind: type) -> Iterator[type]:
    one: type
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)
