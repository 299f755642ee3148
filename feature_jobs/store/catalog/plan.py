"""A plan: what applying a module would change. It is computed only from the recorded and the new definitions.

The new definitions are compared with two kinds of recorded versions. The differences from the version that was applied
last are the plan's changes. The versions that registered models were trained with must stay usable. A plan breaks a
model only if its breaking change is not yet in the version that was applied last. So a break that was allowed once is
not reported again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cluster.errors import BreakingChange
from feature_jobs.store.catalog.differences import Change, Impact, view_changes
from feature_jobs.store.catalog.lifecycle import Lifecycle
from feature_jobs.store.catalog.recorded import Recorded, RecordedService, RecordedView
from feature_jobs.store.catalog.specifications import Definitions
from feature_jobs.store.definitions.names import require_distinct_new_names
from feature_jobs.store.definitions.services import FeatureService
from feature_jobs.store.definitions.views import FeatureView, content_hash

R = TypeVar("R", RecordedView, RecordedService)


class Operation(enum.StrEnum):
    """What a step of a plan does to a view or service."""

    added = "added"
    changed = "changed"
    removed = "removed"
    """The definition was applied from this module, which does not define it any more. Rows and versions stay."""
    unchanged = "unchanged"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a plan does to one view or service."""

    kind: str
    """"view" or "service"."""
    name: str
    operation: Operation
    version: str
    """The version after the step. For a removed definition, its last version."""
    changes: Sequence[Change] = ()
    note: str = ""
    """The view's state, if it is deprecated or retired."""

    @property
    def breaks(self) -> bool:
        """Whether readers of the previous version would no longer get the values they expect."""
        return any(change.impact.breaks for change in self.changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenModel:
    """A registered model version that a plan would break."""

    model: str
    version: int
    view: str
    view_version: str
    """The view's version that the model was trained with."""
    changes: Sequence[Change]
    """The breaking changes."""

    @property
    def is_incompatible(self) -> bool:
        """Whether the plan is refused even with `allow_breaking`."""
        return any(change.impact is Impact.incompatible for change in self.changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What applying a module would change."""

    module: str
    steps: Sequence[Step]
    broken: Sequence[BrokenModel]

    def steps_with(self, *operations: Operation) -> list[Step]:
        """Return the steps with one of these operations."""
        return [step for step in self.steps if step.operation in operations]


def make_plan(
    definitions: Definitions, recorded: Recorded, lifecycles: Mapping[str, Lifecycle] | None = None
) -> Plan:
    """Compare a module's definitions with the recorded definitions.

    Args:
        definitions: The module's definitions.
        recorded: All recorded definitions and models.
        lifecycles: The states of views that are not active.

    Raises:
        DefinitionError: A new name differs only in case from another name.
    """
    views, services = recorded.newest_views, recorded.newest_services
    require_distinct_new_names("view", definitions.views, views)
    require_distinct_new_names("service", definitions.services, services)
    steps = [
        *(_view_step(view, views.get(view.name)) for view in definitions.views.values()),
        *_removed_steps("view", definitions.module, definitions.views, views.values()),
        *(_service_step(service, services.get(service.name)) for service in definitions.services.values()),
        *_removed_steps("service", definitions.module, definitions.services, services.values()),
    ]
    states = lifecycles or {}
    steps = [
        replace(step, note=states[step.name].text(step.name))
        if step.kind == "view" and step.name in states
        else step
        for step in steps
    ]
    broken = [
        *_models_with_changed_code(definitions, recorded),
        *_models_with_changed_views(definitions, recorded),
    ]
    return Plan(module=definitions.module, steps=steps, broken=broken)


def require_no_broken_models(plan: Plan, *, allow_breaking: bool) -> None:
    """Require that a plan breaks no registered model.

    Args:
        plan: The plan.
        allow_breaking: Whether to accept a break, if the model can still read its own version of the view.

    Raises:
        BreakingChange: A model would be broken. The message names model, view and changes, and says what to do.
    """
    refused = [broken for broken in plan.broken if broken.is_incompatible or not allow_breaking]
    if not refused:
        return
    first = max(refused, key=lambda broken: broken.is_incompatible)
    num_others = len({(broken.model, broken.version) for broken in refused}) - 1
    others = f" (and {num_others} other model version{'s' if num_others > 1 else ''})" if num_others else ""
    advice = (
        "allow_breaking does not help, because the model's own version would not stay readable."
        if first.is_incompatible
        else "allow_breaking=true applies it anyway; the model then reads new rows as the new version makes them."
    )
    raise BreakingChange(
        f"View '{first.view}' would break model '{first.model}' version {first.version}{others}, which was trained "
        f"with view version {first.view_version}: {'; '.join(change.text for change in first.changes)}. Nothing was "
        f"applied. Give the changed view a new name, and use that view for new models. {advice}"
    )


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines that print a plan."""
    yield f"plan for {plan.module}:"
    for step in plan.steps:
        yield from _step_lines(step, plan.module)
    for broken in plan.broken:
        yield f"  ! view {broken.view} breaks model {broken.model} version {broken.version}"
    counts = {operation: len(plan.steps_with(operation)) for operation in Operation}
    num_breaking = sum(step.breaks for step in plan.steps)
    yield (
        f"{counts[Operation.added]} to add, {counts[Operation.changed]} to change ({num_breaking} breaking), "
        f"{counts[Operation.removed]} no longer in the module, {counts[Operation.unchanged]} unchanged"
    )


def _step_lines(step: Step, module: str) -> Iterator[str]:
    match step.operation:
        case Operation.added:
            mark, text = "+", f"version {step.version}"
        case Operation.changed:
            mark, text = "~", f"version {step.version}{', breaking' if step.breaks else ''}"
        case Operation.removed:
            mark, text = "-", f"no longer in {module}; its rows and versions stay"
        case Operation.unchanged:
            mark, text = "=", "unchanged"
    yield f"  {mark} {step.kind} {step.name}: {text}"
    yield from (f"      {change.text}" for change in step.changes)
    if step.note:
        yield f"      ! {step.note}"
    elif step.operation is Operation.removed and step.kind == "view":
        yield f"      to end it: python -m feature_jobs.retire view={step.name} reason=…"


def service_changes(before: RecordedService, after: FeatureService) -> list[Change]:
    """Return the changes between two versions of a service. Changes inside its views are in the views' steps.

    Removing a view breaks clients that read the service by its name. A model always reads its own version of it.
    """
    versions = {view.name: view.version for view in after.views}
    changes = [
        Change(
            subject="view",
            before=name,
            after=None,
            impact=Impact.breaking,
            reason="readers of the service lose its columns",
        )
        for name in before.view_order
        if name not in versions
    ]
    added = [name for name in versions if name not in before.view_order]
    changes += [Change(subject="view", before=None, after=name) for name in added]
    changes += [
        Change(subject=f"view {name}", before=before.view_versions[name], after=version)
        for name, version in versions.items()
        if before.view_versions.get(name, version) != version
    ]
    old_order, new_order = (
        ", ".join(name for name in order if name in versions and name in before.view_order)
        for order in (before.view_order, versions)
    )
    if old_order != new_order:
        changes.append(
            Change(
                subject="order",
                before=old_order,
                after=new_order,
                impact=Impact.breaking,
                reason="join keys may come from other features",
            )
        )
    on_demand = [transform.definition() for transform in after.on_demand]
    return [
        *changes,
        *_on_demand_changes(before.on_demand, on_demand),
        *_missing_changes(before.missing, after.missing_definition()),
    ]


def _on_demand_changes(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[Change]:
    old, new = (
        {definition["name"]: definition for definition in definitions} for definitions in (before, after)
    )
    reason = "readers of the service lose its columns, or get other values"
    for name in dict.fromkeys([*old, *new]):
        if name not in old:
            yield Change(subject="on-demand transform", before=None, after=name)
        elif name not in new:
            yield Change(
                subject="on-demand transform", before=name, after=None, impact=Impact.breaking, reason=reason
            )
        elif old[name] != new[name]:
            yield Change(
                subject=f"on-demand transform {name}",
                before=content_hash(old[name])[:8],
                after=content_hash(new[name])[:8],
                impact=Impact.breaking,
                reason=reason,
            )


def _missing_changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Yield changes of policies. A default changes values in training sets; a refusal changes answers to requests."""
    for column in dict.fromkeys([*before, *after]):
        old, new = before.get(column), after.get(column)
        if old == new:
            continue
        impact, reason = Impact.safe, ""
        if "default" in {policy["then"] for policy in (old, new) if policy is not None}:
            impact, reason = Impact.breaking, "training sets built from now on hold other values"
        elif new is not None:
            impact, reason = Impact.restricts, "requests may be refused"
        yield Change(
            subject=f"where {column} is missing",
            before=_policy_text(old),
            after=_policy_text(new),
            impact=impact,
            reason=reason,
        )


def _policy_text(policy: dict[str, Any] | None) -> str:
    if policy is None:
        return "null"
    return f"default {policy['value']!r}" if policy["then"] == "default" else str(policy["then"])


def _view_step(view: FeatureView, before: RecordedView | None) -> Step:
    return _step("view", view, before, lambda recorded: view_changes(recorded.definition, view.definition()))


def _service_step(service: FeatureService, before: RecordedService | None) -> Step:
    return _step("service", service, before, lambda recorded: service_changes(recorded, service))


def _step(
    kind: str,
    definition: FeatureView | FeatureService,
    before: R | None,
    compare: Callable[[R], list[Change]],
) -> Step:
    """Return the step of one definition. `compare` lists the changes from a recorded version."""
    name, version = definition.name, definition.version
    if before is None:
        return Step(kind=kind, name=name, operation=Operation.added, version=version)
    if before.version == version:
        return Step(kind=kind, name=name, operation=Operation.unchanged, version=version)
    return Step(kind=kind, name=name, operation=Operation.changed, version=version, changes=compare(before))


def _removed_steps(
    kind: str,
    module: str,
    defined: Mapping[str, FeatureView] | Mapping[str, FeatureService],
    newest: Iterable[RecordedView | RecordedService],
) -> Iterator[Step]:
    """Yield a step for each recorded definition that came from the module and is not defined in it any more."""
    for recorded in newest:
        if recorded.module == module and recorded.name not in defined:
            yield Step(kind=kind, name=recorded.name, operation=Operation.removed, version=recorded.version)


def _models_with_changed_views(definitions: Definitions, recorded: Recorded) -> Iterator[BrokenModel]:
    """Yield models whose views get breaking changes that are not yet in the version that was applied last."""
    newest = recorded.newest_views
    for use in recorded.uses:
        for name, version in use.view_versions.items():
            trained_with, view = recorded.views.get((name, version)), definitions.views.get(name)
            if trained_with is None or view is None or view.version in (version, newest[name].version):
                continue
            applied_changes = view_changes(trained_with.definition, newest[name].definition)
            changes = [
                change
                for change in view_changes(trained_with.definition, view.definition())
                if change.impact.breaks and change not in applied_changes
            ]
            if changes:
                yield BrokenModel(
                    model=use.model, version=use.version, view=name, view_version=version, changes=changes
                )


def _models_with_changed_code(definitions: Definitions, recorded: Recorded) -> Iterator[BrokenModel]:
    """Yield models whose on-demand transforms have other code now. Their replicas would refuse to start."""
    hashes = {
        transform["name"]: transform["sha256"]
        for service in definitions.services.values()
        for transform in (on_demand.definition()["transform"] for on_demand in service.on_demand)
    }
    for use in recorded.uses:
        for on_demand in use.on_demand:
            function, sha256 = on_demand["transform"]["name"], on_demand["transform"]["sha256"]
            if hashes.get(function, sha256) != sha256:
                change = Change(
                    subject=f"code of {function}",
                    before=sha256[:8],
                    after=hashes[function][:8],
                    impact=Impact.incompatible,
                    reason="the model's replicas would not start; give the new function another name",
                )
                yield BrokenModel(
                    model=use.model,
                    version=use.version,
                    view=on_demand["name"],
                    view_version=sha256[:8],
                    changes=[change],
                )
