"""What applying a module would change, before it changes anything; a pure function of the ledger and the definitions.

A change is held against two things: the version that was applied last, which is what the plan shows, and the versions
that registered models were made with, which must go on meaning what they meant. A model is broken by a plan only
through a change that the version applied last does not have already, so that one break which was allowed is not asked
about again.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import BreakingChange
from feature_jobs.store.catalog.differences import Change, Impact, view_changes
from feature_jobs.store.catalog.lifecycle import Lifecycle
from feature_jobs.store.catalog.recorded import Recorded, RecordedService, RecordedView
from feature_jobs.store.catalog.specifications import Definitions
from feature_jobs.store.definitions.names import require_distinct_new_names
from feature_jobs.store.definitions.services import FeatureService
from feature_jobs.store.definitions.views import FeatureView, content_hash


class Act(enum.StrEnum):
    """What happens to a view or service."""

    added = "added"
    changed = "changed"
    removed = "removed"
    """It was applied from this module, which no longer has it. Nothing is dropped."""
    unchanged = "unchanged"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What happens to one view or service."""

    kind: str
    """"view" or "service"."""
    name: str
    act: Act
    version: str
    """After it; of a removed one, the version it stays at."""
    changes: Sequence[Change] = ()
    note: str = ""
    """Of a view that is deprecated or retired."""

    @property
    def breaks(self) -> bool:
        """Whether readers of the version before would no longer get what they were made for."""
        return any(change.impact.breaks for change in self.changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """A registered model version that a plan would break."""

    model: str
    version: int
    view: str
    view_version: str
    """The one that the model was made with."""
    changes: Sequence[Change]

    @property
    def forever(self) -> bool:
        """Whether it could not be allowed even by who wants to."""
        return any(change.impact is Impact.incompatible for change in self.changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What applying a module would change."""

    module: str
    steps: Sequence[Step]
    broken: Sequence[Broken]

    def of(self, *acts: Act) -> list[Step]:
        """The steps of some kinds."""
        return [step for step in self.steps if step.act in acts]


def make_plan(
    definitions: Definitions, recorded: Recorded, lifecycles: Mapping[str, Lifecycle] | None = None
) -> Plan:
    """Compare a module with what was applied; `lifecycles` has the views that are not active.

    Raises:
        DefinitionError: a new name that differs only in case from another one.
    """
    views, services = recorded.newest_views, recorded.newest_services
    require_distinct_new_names("view", definitions.views, views)
    require_distinct_new_names("service", definitions.services, services)
    steps = [
        *(_view_step(view, views.get(view.name)) for view in definitions.views.values()),
        *_removed("view", definitions, list(views.values())),
        *(_service_step(service, services.get(service.name)) for service in definitions.services.values()),
        *_removed("service", definitions, list(services.values())),
    ]
    states = lifecycles or {}
    steps = [
        replace(step, note=states[step.name].text(step.name))
        if step.kind == "view" and step.name in states
        else step
        for step in steps
    ]
    return Plan(module=definitions.module, steps=steps, broken=list(_broken(definitions, recorded)))


def refuse_broken(plan: Plan, *, allow_breaking: bool) -> None:
    """Go on only with a plan that leaves every registered model what it was made with.

    Args:
        plan: what would be done.
        allow_breaking: whether models may be broken where their versions stay readable.

    Raises:
        BreakingChange: naming model, version, view, changes, and what to do.
    """
    stopping = [one for one in plan.broken if one.forever or not allow_breaking]
    if not stopping:
        return
    first = max(stopping, key=lambda one: one.forever)
    more = len({(one.model, one.version) for one in stopping}) - 1
    others = f" (and {more} other model version{'s' if more > 1 else ''})" if more else ""
    advice = (
        "allow_breaking does not help, because the model's own version would not stay readable."
        if first.forever
        else "With allow_breaking=true it is done all the same; the model then reads new rows as they now are."
    )
    raise BreakingChange(
        f"View '{first.view}' would break model '{first.model}' version {first.version}{others}, which was made with "
        f"view version {first.view_version}: {'; '.join(change.text for change in first.changes)}. Nothing was "
        f"applied. Give the changed view a new name and let new models use that one. {advice}"
    )


def lines(plan: Plan) -> Iterator[str]:
    """The plan as text."""
    marks = {Act.added: "+", Act.changed: "~", Act.removed: "-", Act.unchanged: "="}
    yield f"plan for {plan.module}:"
    for step in plan.steps:
        tail = {
            Act.added: f"version {step.version}",
            Act.changed: f"version {step.version}{', breaking' if step.breaks else ''}",
            Act.removed: f"no longer in {plan.module}; its rows and versions stay",
            Act.unchanged: "unchanged",
        }[step.act]
        yield f"  {marks[step.act]} {step.kind} {step.name}: {tail}"
        yield from (f"      {change.text}" for change in step.changes)
        if step.note:
            yield f"      ! {step.note}"
        elif step.act is Act.removed and step.kind == "view":
            yield f"      to end it: python -m feature_jobs.retire view={step.name} reason=…"
    for one in plan.broken:
        yield f"  ! view {one.view} breaks model {one.model} version {one.version}"
    counts = {act: len(plan.of(act)) for act in Act}
    breaking = sum(step.breaks for step in plan.steps)
    yield (
        f"{counts[Act.added]} to add, {counts[Act.changed]} to change ({breaking} breaking), "
        f"{counts[Act.removed]} no longer in the module, {counts[Act.unchanged]} unchanged"
    )


def service_changes(before: RecordedService, after: FeatureService) -> list[Change]:
    """The differences between two versions of a service; views' own changes stand with the views.

    Taking a view out is breaking for whoever reads the service by its name. Models name its version.
    """
    new = {view.name: view.version for view in after.views}
    changes = [
        Change(
            what="view",
            before=name,
            after=None,
            impact=Impact.breaking,
            why="readers of the service lose its columns",
        )
        for name in before.view_order
        if name not in new
    ]
    changes += [Change(what="view", before=None, after=name) for name in new if name not in before.view_order]
    changes += [
        Change(what=f"view {name}", before=before.view_versions[name], after=version)
        for name, version in new.items()
        if before.view_versions.get(name, version) != version
    ]
    orders = [
        [name for name in one if name in new and name in before.view_order]
        for one in (before.view_order, new)
    ]
    if orders[0] != orders[1]:
        why = "join keys may be taken from other features"
        order = [", ".join(one) for one in orders]
        changes.append(Change(what="order", before=order[0], after=order[1], impact=Impact.breaking, why=why))
    on_demand = [one.definition() for one in after.on_demand]
    return [
        *changes,
        *_on_demand_changes(before.on_demand, on_demand),
        *_missing_changes(before.missing, after.missing_definition()),
    ]


def _on_demand_changes(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[Change]:
    old, new = ({one["name"]: one for one in some} for some in (before, after))
    why = "readers of the service lose its columns, or get others"
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name), new.get(name)
        if was is None:
            yield Change(what="on-demand transform", before=None, after=name)
        elif now is None:
            yield Change(what="on-demand transform", before=name, after=None, impact=Impact.breaking, why=why)
        elif was != now:
            hashes = [content_hash(one)[:8] for one in (was, now)]
            yield Change(
                what=f"on-demand transform {name}",
                before=hashes[0],
                after=hashes[1],
                impact=Impact.breaking,
                why=why,
            )


def _missing_changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """A default changes what training sets hold; a refusal what requests are answered."""
    for column in dict.fromkeys([*before, *after]):
        was, now = before.get(column), after.get(column)
        if was == now:
            continue
        impact, why = Impact.safe, ""
        if "default" in {one["then"] for one in (was, now) if one is not None}:
            impact, why = Impact.breaking, "training sets built from now on hold other values"
        elif now is not None:
            impact, why = Impact.restricts, "requests may be refused"
        texts = ["null" if one is None else _then(one) for one in (was, now)]
        what = f"where {column} is missing"
        yield Change(what=what, before=texts[0], after=texts[1], impact=impact, why=why)


def _then(stated: dict[str, Any]) -> str:
    return f"default {stated['value']!r}" if stated["then"] == "default" else str(stated["then"])


def _view_step(view: FeatureView, before: RecordedView | None) -> Step:
    version = view.version
    if before is None:
        return Step(kind="view", name=view.name, act=Act.added, version=version)
    if before.version == version:
        return Step(kind="view", name=view.name, act=Act.unchanged, version=version)
    changes = view_changes(before.definition, view.definition())
    return Step(kind="view", name=view.name, act=Act.changed, version=version, changes=changes)


def _service_step(service: FeatureService, before: RecordedService | None) -> Step:
    version = service.version
    if before is None:
        return Step(kind="service", name=service.name, act=Act.added, version=version)
    if before.version == version:
        return Step(kind="service", name=service.name, act=Act.unchanged, version=version)
    changes = service_changes(before, service)
    return Step(kind="service", name=service.name, act=Act.changed, version=version, changes=changes)


def _removed(
    kind: str, definitions: Definitions, newest: Sequence[RecordedView | RecordedService]
) -> Iterator[Step]:
    present = definitions.views.keys() if kind == "view" else definitions.services.keys()
    for one in newest:
        if one.module == definitions.module and one.name not in present:
            yield Step(kind=kind, name=one.name, act=Act.removed, version=one.version)


def _broken(definitions: Definitions, recorded: Recorded) -> Iterator[Broken]:
    yield from _broken_code(definitions, recorded)
    newest = recorded.newest_views
    for use in recorded.uses:
        for name, version in use.view_versions.items():
            made_with, view = recorded.views.get((name, version)), definitions.views.get(name)
            if made_with is None or view is None or view.version in (version, newest[name].version):
                continue
            already = view_changes(made_with.definition, newest[name].definition)
            changes = [
                change
                for change in view_changes(made_with.definition, view.definition())
                if change.impact.breaks and change not in already
            ]
            if changes:
                yield Broken(
                    model=use.model, version=use.version, view=name, view_version=version, changes=changes
                )


def _broken_code(definitions: Definitions, recorded: Recorded) -> Iterator[Broken]:
    """On-demand transforms whose code is not what models call: they would refuse to serve."""
    here = {
        one["transform"]["name"]: one["transform"]["sha256"]
        for service in definitions.services.values()
        for one in (made.definition() for made in service.on_demand)
    }
    for use in recorded.uses:
        for one in use.on_demand:
            function, sha256 = one["transform"]["name"], one["transform"]["sha256"]
            if here.get(function, sha256) != sha256:
                change = Change(
                    what=f"code of {function}",
                    before=sha256[:8],
                    after=here[function][:8],
                    impact=Impact.incompatible,
                    why="the model's replicas would not start; give the new function another name",
                )
                yield Broken(
                    model=use.model,
                    version=use.version,
                    view=one["name"],
                    view_version=sha256[:8],
                    changes=[change],
                )
