"""Definitions say at once what is wrong with them, and their version follows their meaning."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import DefinitionError
from feature_jobs.store import (
    Allowed,
    Drift,
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    Freshness,
    NotNull,
    NullShare,
    Outlier,
    Pattern,
    Range,
    RowCount,
    Sensitivity,
    Unique,
)

PERSON = Entity("person", join_keys=["person_id"])
SOURCE = FileSource("income.parquet", event_timestamp="at", created_timestamp="known")
FACTOR = 2


def double(table: pa.Table) -> pa.Table:
    return _scaled(table)


def _scaled(table: pa.Table) -> pa.Table:
    return table.set_column(0, "amount", pa.array([value.as_py() * FACTOR for value in table["amount"]]))


def view(**changes: Any) -> FeatureView:
    """A view that can be applied, with some parts changed."""
    parts: dict[str, Any] = {
        "entities": [PERSON],
        "source": SOURCE,
        "schema": [Field("amount", "float64", sensitivity=Sensitivity.PERSONAL), Field("sector", "string")],
        "ttl": timedelta(days=365),
        "owner": "risk",
        "purposes": ["credit_scoring"],
    }
    return FeatureView("income", **(parts | changes))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Field("amount", "flaot64"), "unknown dtype 'flaot64'. Did you mean 'float64'"),
        (lambda: Field("total amount", "int64"), "letters, digits and underscores"),
        (lambda: Entity("person", join_keys=[]), "no join key"),
        (lambda: Entity("person", join_keys="person_id"), "must be a list"),
        (lambda: FileSource("", event_timestamp="at"), "needs a path"),
        (lambda: FileSource("x", event_timestamp="at", deleted="at"), "a bool column of its own"),
        (lambda: view(schema=[Field("deleted", "bool")]), "reserved for the platform"),
        (lambda: view(entities=[]), "no entity"),
        (lambda: view(schema=[]), "no features"),
        (lambda: view(schema=[Field("a", "int64"), Field("a", "string")]), "the field 'a' twice"),
        (lambda: view(schema=[Field("person_id", "int64")]), "join key and cannot be a feature too"),
        (lambda: view(schema=[Field("ingest_seq", "int64")]), "reserved for the platform"),
        (lambda: view(checks=[NotNull("amuont")]), "unknown column 'amuont'. Did you mean 'amount'"),
        (lambda: view(checks=["amount > 0"]), "is not a check"),
        (lambda: view(checks=[Range("sector", minimum=0)]), "needs a numeric column"),
        (lambda: view(checks=[Allowed("sector", values=[1])]), "do not fit dtype string"),
        (lambda: Range("amount"), "minimum or a maximum"),
        (lambda: Range("amount", minimum=2, maximum=1), "above maximum"),
        (lambda: Allowed("sector"), "needs values"),
        (lambda: Field("a", "int64", from_columns="x"), "must be a list"),
        (lambda: view(schema=[Field("a", "int64", from_columns=["x"])]), "has no transform"),
        (lambda: Pattern("sector"), "needs a pattern"),
        (lambda: Pattern("sector", "a("), "is not a valid RE2 expression"),
        (lambda: Pattern("sector", "a)(b"), "is not a valid RE2 expression"),
        (lambda: Pattern("sector", "(?=a)"), "is not a valid RE2 expression"),
        (lambda: view(checks=[Pattern("amount", "a")]), "needs a column of text"),
        (lambda: Unique("sector"), "needs a list"),
        (lambda: view(checks=[Unique(["sector", "amuont"])]), "unknown column 'amuont'"),
        (lambda: Outlier("amount", fences=0), "fences must be positive"),
        (lambda: view(checks=[Outlier("sector")]), "needs a numeric feature"),
        (lambda: view(checks=[Outlier("person_id")]), "needs a numeric feature"),
        (lambda: NullShare("amount", 1.0), "at least 0 and below 1"),
        (lambda: view(checks=[NullShare("person_id", 0.5)]), "is a join key"),
        (lambda: Freshness(timedelta(0)), "maximum_age must be positive"),
        (lambda: RowCount(1.0), "factor must be above 1"),
        (lambda: Drift("amount", 0.0), "threshold must be positive"),
        (lambda: view(schema=[Field("seen", "timestamp")], checks=[Drift("seen")]), "Use Freshness"),
        (lambda: view(ttl=timedelta(0)), "ttl must be positive"),
        (lambda: view(created_lag=timedelta(days=-1)), "created_lag must not be negative"),
        (lambda: view(subject_key="persn_id"), "Did you mean 'person_id'"),
        (lambda: view(purposes="credit"), "purposes must be a list"),
        (lambda: view(transform="double").version, "must be a plain function"),
        (lambda: FeatureService("credit", views=[]), "no view"),
        (lambda: FeatureService("credit", views=[view(), view()]), "names the view 'income' twice"),
        (lambda: FeatureView("a__b", entities=[PERSON], source=SOURCE, schema=[Field("x", "int64")]), "'__'"),
    ],
)
def test_mistake_is_named(make: Callable[[], Any], words: str) -> None:
    """A definition that cannot work does not come to be, and the message says why."""
    with pytest.raises(DefinitionError, match=re.escape(words)):
        make()


def test_version_is_stable_for_the_same_definition() -> None:
    """Equal content, equal version: applying twice changes nothing."""
    assert view(transform=double).version == view(transform=double).version


@pytest.mark.parametrize(
    "changes",
    [
        {"ttl": timedelta(days=364)},
        {"owner": "sales"},
        {"purposes": []},
        {"region": "eu"},
        {"subject_key": "person_id"},
        {"checks": [NotNull("amount")]},
        {"transform": double},
        {"source": replace(SOURCE, deleted="gone")},
        {"created_lag": timedelta(days=1)},
        {"schema": [Field("amount", "float64"), Field("sector", "string")]},
    ],
)
def test_version_follows_every_part(changes: dict[str, Any]) -> None:
    """What governance or readers depend on is part of the version."""
    assert view().version != view(**changes).version


def test_a_view_without_tombstones_keeps_the_definition_it_had() -> None:
    """A project from before sees no change."""
    assert set(view().definition()["source"]) == {"path", "event_timestamp", "created_timestamp"}


def test_columns_that_a_feature_comes_from_are_recorded_where_they_are_said() -> None:
    """A field that does not say them is described as before."""
    said, unsaid = (
        view(schema=[Field("amount", "float64", from_columns=columns)], transform=double).definition()
        for columns in (["gross", "tax"], [])
    )
    assert said["schema"][0]["from_columns"] == ["gross", "tax"]
    assert "from_columns" not in unsaid["schema"][0]


def test_every_rule_can_be_recorded() -> None:
    """A version is a hash of JSON, which knows no enum and no time span."""
    rules = [Unique(["person_id", "event_timestamp"], keep="first"), Freshness(timedelta(days=2))]
    checks = [*rules, Pattern("sector", "[a-z]+"), Outlier("amount"), RowCount(2.0), Drift("amount")]
    assert view(checks=checks).version != view().version
    assert [rule.definition() for rule in rules] == [
        {"check": "Unique", "of": ["person_id", "event_timestamp"], "keep": "first"},
        {"check": "Freshness", "maximum_age_s": 172800.0},
    ]
    assert [type(rule).from_definition(rule.definition()) for rule in checks] == checks


def test_version_of_a_view_with_the_old_rules_is_what_it_was() -> None:
    """Rules that came later change nothing for a view that has none of them."""
    checks = [NotNull("amount"), Range("amount", minimum=0), Allowed("sector", values=["a"])]
    assert view(checks=checks).version == "460fff526ed2"


def test_version_follows_constants_and_helpers_of_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed factor in a helper is a changed feature."""
    before = view(transform=double).version
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert view(transform=double).version != before


def test_service_version_follows_its_views_and_their_order() -> None:
    """A service is its views' versions, in order."""
    one, other = view(), replace(view(), name="wealth")
    versions = {
        FeatureService("credit", views=views).version
        for views in ([one, other], [other, one], [one], [replace(one, owner="x"), other])
    }
    assert len(versions) == 4


def test_definition_holds_governance_per_column() -> None:
    """Sensitivity, owner and purposes reach the ledger."""
    definition = view().definition()
    assert [field["sensitivity"] for field in definition["schema"]] == ["personal", "internal"]
    assert (definition["owner"], definition["purposes"]) == ("risk", ["credit_scoring"])
