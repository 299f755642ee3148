"""Policies for missing and expired features have the same effect in serving and in training."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import DefinitionError, FeatureAbsent
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureServiceApplied
from feature_jobs.store import (
    Aggregation,
    Default,
    FeatureService,
    Field,
    Missing,
)
from feature_jobs.store.catalog.differences import Impact
from feature_jobs.store.catalog.plan import make_plan
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import ServiceSpec, service_spec
from feature_jobs.store.definitions.missing import (
    ABSENT,
    MissingPolicy,
    fill_offline,
    fill_online,
    parse_policy,
)
from feature_jobs.store.types.dtypes import DTYPES
from feature_jobs.store.types.status import Status
from tests.projects.features import INCOME as PEOPLES_INCOME
from tests.projects.features import PEOPLE, FeatureProject
from tests.projects.views import apply_service, define, make_view

INCOME = make_view(
    schema=[
        Field("amount", "float64"),
        Field("jobs", "int32"),
        Field("sector", "string"),
        Field("at", "timestamp"),
    ],
)
VISITS = make_view(
    "visits",
    schema=[Field("id", "string"), Field("page", "string")],
    event_id="id",
    aggregations=[Aggregation("*", "count", windows=[timedelta(days=1)])],
)


def service(missing: Any = Missing.NULL) -> FeatureService:
    return FeatureService("credit", views=[INCOME, VISITS], missing=missing)


def test_policy_is_part_of_the_version_unless_it_is_null() -> None:
    """A service without a policy, or with Missing.NULL, keeps its version."""
    plain = FeatureService("credit", views=[PEOPLES_INCOME]).version
    assert plain == FeatureService("credit", views=[PEOPLES_INCOME], missing={"income": Missing.NULL}).version
    assert service().version == service({}).version
    versions = {
        service(policy).version for policy in (Missing.NULL, Missing.REFUSE, {"income": Missing.REFUSE})
    }
    assert len(versions) == 3
    whole, fraction = (service({"income__amount": Default(policy)}).version for policy in (0, 0.0))
    assert whole == fraction not in versions


@pytest.mark.parametrize("number", [2**53 - 1, 2**53, -(2**53), 2**53 + 1])
def test_default_may_be_a_whole_number_that_json_does_not_hold_exactly(ledger: Ledger, number: int) -> None:
    """The ledger has it as text."""
    spec = apply_service(ledger, service({"visits__count_1d": Default(number)}))
    assert spec.missing.defaults == {"visits__count_1d": number}


def test_ledger_has_the_policy(ledger: Ledger) -> None:
    """A feature's policy takes precedence over its view's. Events of older releases have no policy."""
    missing = {
        "income": Missing.REFUSE,
        "income__jobs": Default(2**31 - 1),
        "income__at": Missing.NULL,
        "visits__count_1d": Default(2**60),
    }
    spec = apply_service(ledger, service(missing))
    assert spec.missing == MissingPolicy(
        defaults={"income__jobs": 2**31 - 1, "visits__count_1d": 2**60},
        refused=("income__amount", "income__sector"),
    )
    assert ServiceSpec.from_dict(spec.to_dict()) == spec
    versions = {view.name: view.version for view in spec.views}
    event = FeatureServiceApplied(service="old", version="v", views=versions, view_order=[*versions])
    payload = {name: value for name, value in event.payload().items() if name != "missing"}
    ledger.append(FeatureServiceApplied(**payload), actor="t")
    assert not service_spec(ledger, "old").missing


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ({"income__amont": Missing.REFUSE}, "Did you mean 'income__amount'"),
        ({"wealth": Missing.REFUSE}, "no such view or feature"),
        ({"income": Default(0.0)}, "for one feature, not for the view 'income'"),
        ({"income__amount": Default("much")}, "'much' does not fit float64"),
        ({"income__amount": Default(float("nan"))}, "does not fit float64"),
        ({"income__amount": Default(10**400)}, "of more than 99 digits does not fit float64"),
        ({"income__jobs": Default(-(10**5000))}, "of more than 99 digits does not fit int32"),
        ({"income__amount": Default(True)}, "True does not fit float64"),
        ({"income__jobs": Default(2**31)}, "does not fit int32"),
        ({"income__jobs": Default(1.0)}, "1.0 does not fit int32"),
        ({"income__sector": Default(1)}, "1 does not fit string"),
        ({"income__at": Default("2024-01-01")}, "timestamps cannot have a default"),
        ({"income__amount": "refuse "}, "is not a policy"),
    ],
)
def test_invalid_policy_is_refused(missing: Any, words: str) -> None:
    """The definition of the service fails."""
    with pytest.raises(DefinitionError, match=words):
        service(missing)


def test_plan_shows_the_impact_of_a_changed_policy(ledger: Ledger) -> None:
    """A default is breaking, a refusal restricts, and removing a refusal is safe."""
    apply_service(ledger, service({"income__jobs": Missing.REFUSE, "income__amount": Default(1.5)}))
    after = service({"income__sector": Missing.REFUSE, "income__amount": Default(2)})
    plan = make_plan(define(service=after), read_recorded(ledger))
    [step] = [step for step in plan.steps if step.kind == "service"]
    assert {(change.text.split(" [")[0].rstrip(), change.impact) for change in step.changes} == {
        ("~ where income__amount is missing default 1.5 -> default 2.0", Impact.breaking),
        ("~ where income__jobs is missing refuse -> null", Impact.safe),
        ("~ where income__sector is missing null -> refuse", Impact.restricts),
    }


VALUES = {
    "float64": st.none() | st.floats(-1e9, 1e9),
    "float32": st.none() | st.floats(-1e9, 1e9, width=32),
    "int64": st.none() | st.integers(-(2**63), 2**63 - 1),
    "string": st.none() | st.text(max_size=3),
    "bool": st.none() | st.booleans(),
}


@pytest.mark.parametrize("dtype", VALUES)
@given(data=st.data())
def test_serving_fills_as_training_does(dtype: str, data: st.DataObject) -> None:
    """Both fill the same missing and expired values. A null from the source stays."""
    view = make_view("v", schema=[Field("x", dtype)])
    default = data.draw(VALUES[dtype].filter(lambda value: value is not None))
    service = FeatureService("s", views=[view], missing={"v__x": Default(default)})
    policy = parse_policy(service.missing_definition(), {"v__x": dtype})
    rows = data.draw(st.lists(st.tuples(VALUES[dtype], st.sampled_from(list(Status))), min_size=1))
    status = [Status.null if value is None and one is Status.present else one for value, one in rows]
    values = [value if one is Status.present else None for (value, _), one in zip(rows, status, strict=True)]
    absent = [one in ABSENT for one in status]
    table = pa.table({"v__x": pa.array(values, DTYPES[dtype])})
    trained = fill_offline(policy, table, {"v": pa.array(absent)})["v__x"].to_pylist()
    columns = {"v__x": list(values)}
    filled_rows = fill_online(policy, columns, {"v__x": status}, service="s", needed={"v__x"})
    assert repr(columns["v__x"]) == repr(trained)
    assert filled_rows.get("v__x", []) == [row for row, is_absent in enumerate(absent) if is_absent]


def test_refusal_names_feature_status_and_entity() -> None:
    """A feature that the answer does not need is never refused."""
    policy = MissingPolicy(refused=("income__amount", "income__sector"))
    status = {"income__amount": ["present", "expired", "missing"], "income__sector": ["null"] * 3}
    columns = {name: [None] * 3 for name in status}
    assert fill_online(policy, columns, status, service="credit", needed={"income__sector"}) == {}
    words = re.escape("'amount' of view 'income' is expired for entities[1], and 1 more")
    with pytest.raises(FeatureAbsent, match=words) as refused:
        fill_online(policy, columns, status, service="credit", needed=set(status))
    assert refused.value.status == {"income__amount": ["present", "expired", "missing"]}


def test_a_training_set_holds_the_defaults(feature_project: FeatureProject) -> None:
    """Defaults replace values of unknown entities, not ingested nulls. The manifest has the share of defaults."""
    amounts: list[Any] = [float(number) for number in range(PEOPLE)]
    amounts[3] = None
    feature_project.ingest(0, amount=pa.array(amounts, pa.float64()))
    feature_project.write_entities(PEOPLE + 5)
    plain = feature_project.build("plain")
    number = FeatureService("credit", views=[PEOPLES_INCOME], missing={"income__amount": Default(-1)})
    apply_service(feature_project.ledger, number)
    manifest = feature_project.build()
    assert manifest["default_share"] == {"income__amount": 5 / (PEOPLE + 5)}
    assert manifest["null_share"] == {"income__amount": 1 / (PEOPLE + 5)}
    assert "default_share" not in plain
    assert feature_project.again()["row_hash"] == manifest["row_hash"] != plain["row_hash"]
