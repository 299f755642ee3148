"""A plan shows changes before they are made, and protects the features of registered models."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BreakingChange
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureViewApplied, ModelRegistered
from feature_jobs.apply import views_without_purpose
from feature_jobs.store import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    NotNull,
    Range,
    RowCount,
    Sensitivity,
)
from feature_jobs.store.catalog.differences import Impact, view_changes
from feature_jobs.store.catalog.plan import Operation, Plan, make_plan, plan_lines, require_no_broken_models
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import Definitions, apply, service_spec
from tests.projects.views import define, make_view

AMOUNT, SECTOR, CITY = Field("amount", "float64"), Field("sector", "string"), Field("city", "string")
WHOLE, PRIVATE = Field("amount", "int64"), replace(AMOUNT, sensitivity=Sensitivity.PERSONAL)
SOURCE = FileSource("income.parquet", event_timestamp="at")
OTHER_KEY = Entity("person", join_keys=["id"])


def as_it_is(table: pa.Table) -> pa.Table:
    return table


def view(name: str = "income", **changes: Any) -> FeatureView:
    """A view, with some parts changed."""
    parts: dict[str, Any] = {
        "source": SOURCE,
        "schema": [AMOUNT, SECTOR],
        "ttl": timedelta(days=30),
        "retention": timedelta(days=300),
        "purposes": ["credit", "fraud"],
    }
    return make_view(name, **(parts | changes))


def module(*views: FeatureView) -> Definitions:
    """A module with these views and a service with all of them."""
    return define(service=FeatureService("credit", views=views), module="shop")


def applied(ledger: Ledger, *views: FeatureView) -> None:
    apply(module(*views), ledger, actor="user:test")


def register(ledger: Ledger, version: int = 1) -> None:
    """Register a model that was trained with the applied service."""
    service = service_spec(ledger, "credit")
    lineage = {"service": service.name, "service_version": service.version}
    event = ModelRegistered(
        name="loan",
        version=version,
        family="trees",
        task="binary",
        manifest_hash="",
        files={},
        lineage=lineage,
        metrics={},
    )
    ledger.append(event, actor="user:test")


def planned(ledger: Ledger, *views: FeatureView) -> Plan:
    return make_plan(module(*views), read_recorded(ledger))


@pytest.mark.parametrize(
    ("changes", "text", "impact"),
    [
        ({"schema": [AMOUNT, SECTOR, CITY]}, "+ column city string, internal", Impact.safe),
        ({"schema": [AMOUNT]}, "- column sector string, internal", Impact.breaking),
        ({"schema": [SECTOR, AMOUNT]}, "~ column order amount, sector -> sector, amount", Impact.safe),
        ({"schema": [WHOLE, SECTOR]}, "amount dtype float64 -> int64", Impact.incompatible),
        ({"schema": [PRIVATE, SECTOR]}, "amount sensitivity internal -> personal", Impact.incompatible),
        ({"schema": [replace(AMOUNT, categorical=True), SECTOR]}, "categorical False -> True", Impact.safe),
        ({"schema": [replace(AMOUNT, description="in euro"), SECTOR]}, "none -> in euro", Impact.safe),
        ({"entities": [OTHER_KEY]}, "join keys person_id -> id", Impact.incompatible),
        ({"entities": [Entity("human", join_keys=["person_id"])]}, "entities person -> human", Impact.safe),
        ({"ttl": timedelta(days=3)}, "time-to-live 30 days -> 3 days", Impact.safe),
        ({"ttl": None}, "time-to-live 30 days -> none", Impact.safe),
        ({"transform": as_it_is}, "transform none -> ", Impact.breaking),
        ({"created_lag": timedelta(hours=1)}, "created_lag 0 s -> 3600 s", Impact.breaking),
        ({"source": replace(SOURCE, path="b.parquet")}, "-> b.parquet", Impact.safe),
        ({"source": replace(SOURCE, event_timestamp="on")}, ".event_timestamp at -> on", Impact.breaking),
        ({"source": replace(SOURCE, created_timestamp="known")}, "created_timestamp known", Impact.breaking),
        ({"checks": [NotNull("amount")]}, "+ check NotNull(amount)", Impact.safe),
        ({"checks": [RowCount(2.0)]}, "+ check RowCount(factor=2.0)", Impact.safe),
        ({"checks": [Range("amount", minimum=0)]}, "+ check Range(amount, minimum=0", Impact.safe),
        ({"owner": "risk"}, "owner none -> risk", Impact.safe),
        ({"purposes": ["credit"]}, "purposes credit, fraud -> credit", Impact.restricts),
        ({"purposes": []}, "purposes credit, fraud -> all", Impact.safe),
        ({"region": "eu"}, "region none -> eu", Impact.restricts),
        ({"retention": timedelta(days=3)}, "retention 300 days -> 3 days", Impact.restricts),
        ({"retention": None}, "retention 300 days -> none", Impact.safe),
        ({"subject_key": "person_id"}, "subject key none -> person_id", Impact.safe),
    ],
)
def test_each_change_has_a_text_and_an_impact(changes: dict[str, Any], text: str, impact: Impact) -> None:
    """The impact is the one on readers of an earlier version."""
    [change] = view_changes(view().definition(), view(**changes).definition())
    assert text in change.text
    assert (change.impact, impact.value in change.text) == (impact, impact is not Impact.safe)


def test_unknown_change_is_breaking_unless_it_adds_a_named_entry() -> None:
    """Definitions of later releases can be compared too."""
    old = view().definition() | {"windows": [{"name": "a", "days": 1}], "mode": "x"}
    new = view().definition() | {"windows": [{"name": "a", "days": 2}, {"name": "b"}], "mode": "y"}
    impacts = {change.subject: change.impact for change in view_changes(old, new)}
    assert impacts == {"windows a": Impact.breaking, "windows b": Impact.safe, "mode": Impact.breaking}


COLUMNS = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.sampled_from(["int64", "string"]), min_size=1
).map(lambda columns: [Field(name, dtype) for name, dtype in columns.items()])


@given(old=COLUMNS, new=COLUMNS)
def test_no_changes_exactly_if_versions_are_equal(old: list[Field], new: list[Field]) -> None:
    """Reverting a change gives the reverse changes."""
    before, after = view(schema=old), view(schema=new)
    changes = view_changes(before.definition(), after.definition())
    reverse = view_changes(after.definition(), before.definition())
    assert (not changes) == (before.version == after.version)
    forth, back = (
        [change for change in found if change.subject != "column order"] for found in (changes, reverse)
    )
    undone = sorted((change.subject, change.after, change.before) for change in back)
    assert sorted((change.subject, change.before, change.after) for change in forth) == undone


def test_plan_shows_added_changed_removed_and_unchanged(ledger: Ledger) -> None:
    """Definitions that another module applied do not count as removed."""
    applied(ledger, view("income"), view("old"), view("same"))
    apply(define(view("theirs"), module="other"), ledger, actor="user:test")
    plan = planned(ledger, view("income", schema=[AMOUNT]), view("same"), view("new"))
    operations = {(step.kind, step.name): step.operation for step in plan.steps}
    assert operations == {
        ("view", "income"): Operation.changed,
        ("view", "same"): Operation.unchanged,
        ("view", "new"): Operation.added,
        ("view", "old"): Operation.removed,
        ("service", "credit"): Operation.changed,
    }
    text = "\n".join(plan_lines(plan))
    assert "- column sector string, internal  [breaking" in text
    assert "- view old: no longer in shop; its rows and versions stay" in text
    assert text.endswith("1 to add, 2 to change (2 breaking), 1 no longer in the module, 1 unchanged")


def test_definitions_of_an_older_release_never_count_as_removed(ledger: Ledger) -> None:
    """Their events do not say which module they came from. They are still compared."""
    for old_view in (view("income"), view("gone")):
        event = FeatureViewApplied(
            view=old_view.name, version=old_view.version, definition=old_view.definition()
        )
        ledger.append(event, actor="user:test")
    steps = {(step.kind, step.name): step.operation for step in planned(ledger, view("income")).steps}
    assert steps == {("view", "income"): Operation.unchanged, ("service", "credit"): Operation.added}


def test_breaking_change_without_a_model_is_applied(ledger: Ledger) -> None:
    """No model reads the previous version."""
    applied(ledger, view())
    plan = planned(ledger, view(schema=[AMOUNT]))
    require_no_broken_models(plan, allow_breaking=False)
    assert [step.breaks for step in plan.steps] == [True, False]


def test_change_that_breaks_a_model_is_refused_unless_it_is_allowed(ledger: Ledger) -> None:
    """The error names model, version, change and the solution. A break that was allowed once is not reported again."""
    applied(ledger, view())
    register(ledger)
    broken = view(schema=[AMOUNT])
    plan = planned(ledger, broken)
    with pytest.raises(
        BreakingChange, match=r"model 'loan' version 1.*column sector.*new name.*allow_breaking"
    ):
        require_no_broken_models(plan, allow_breaking=False)
    require_no_broken_models(plan, allow_breaking=True)
    applied(ledger, broken)
    require_no_broken_models(planned(ledger, replace(broken, owner="risk")), allow_breaking=False)
    with pytest.raises(BreakingChange, match="transform"):
        require_no_broken_models(planned(ledger, replace(broken, transform=as_it_is)), allow_breaking=False)


def test_model_of_an_older_version_is_protected_too(ledger: Ledger) -> None:
    """A safe change after the model was trained does not end its protection."""
    applied(ledger, view())
    register(ledger)
    wider = view(schema=[AMOUNT, SECTOR, CITY])
    require_no_broken_models(planned(ledger, wider), allow_breaking=False)
    applied(ledger, wider)
    require_no_broken_models(planned(ledger, view(schema=[AMOUNT, SECTOR])), allow_breaking=False)
    with pytest.raises(BreakingChange, match="column amount"):
        require_no_broken_models(planned(ledger, view(schema=[SECTOR, CITY])), allow_breaking=False)


def test_incompatible_change_is_refused_even_if_allowed(ledger: Ledger) -> None:
    """The model's own view version would not stay readable."""
    applied(ledger, view())
    for version in (1, 2):
        register(ledger, version)
    plan = planned(ledger, view(schema=[Field("amount", "int64"), SECTOR]))
    with pytest.raises(BreakingChange, match=r"1 other model version\).*does not help"):
        require_no_broken_models(plan, allow_breaking=True)


def test_removing_or_reordering_views_of_a_service_is_breaking(ledger: Ledger) -> None:
    """Models are not affected, because they read one version of the service."""
    applied(ledger, view("income"), view("wealth"))
    register(ledger)
    for views in ([view("income")], [view("wealth"), view("income")]):
        plan = planned(ledger, *views)
        assert next(step for step in plan.steps if step.kind == "service").breaks
        require_no_broken_models(plan, allow_breaking=False)


@pytest.mark.parametrize(
    ("sensitivity", "purposes", "warned"),
    [
        (Sensitivity.PERSONAL, [], ["income"]),
        (Sensitivity.SENSITIVE, [], ["income"]),
        (Sensitivity.PERSONAL, ["care"], []),
        (Sensitivity.INTERNAL, [], []),
    ],
)
def test_view_without_purpose_for_protected_fields_is_listed(
    sensitivity: Sensitivity, purposes: list[str], warned: list[str]
) -> None:
    """A principal that may read its columns may read them for any purpose."""
    view = make_view(schema=[Field("a", "float64", sensitivity=sensitivity)], purposes=purposes)
    assert views_without_purpose(define(view)) == warned
