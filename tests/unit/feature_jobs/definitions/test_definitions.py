"""Definitions are validated when they are created, and their version depends on their content."""

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
from tests.projects.views import make_view

SOURCE = FileSource("income.parquet", event_timestamp="at", created_timestamp="known")
FACTOR = 2


def double(table: pa.Table) -> pa.Table:
    return _scaled(table)


def _scaled(table: pa.Table) -> pa.Table:
    return table.set_column(0, "amount", pa.array([value.as_py() * FACTOR for value in table["amount"]]))


def view(**changes: Any) -> FeatureView:
    """A valid view, with some parts changed."""
    parts: dict[str, Any] = {
        "source": SOURCE,
        "schema": [Field("amount", "float64", sensitivity=Sensitivity.PERSONAL), Field("sector", "string")],
        "ttl": timedelta(days=365),
        "owner": "risk",
        "purposes": ["credit_scoring"],
    }
    return make_view(**(parts | changes))


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
        (lambda: make_view("a__b"), "'__'"),
    ],
)
def test_invalid_definition_is_refused(make: Callable[[], Any], words: str) -> None:
    """The error says what is wrong."""
    with pytest.raises(DefinitionError, match=re.escape(words)):
        make()


def test_version_is_stable_for_the_same_definition() -> None:
    """Equal definitions have equal versions. The definition has sensitivity, owner and purposes."""
    assert view(transform=double).version == view(transform=double).version
    definition = view().definition()
    assert [field["sensitivity"] for field in definition["schema"]] == ["personal", "internal"]
    assert (definition["owner"], definition["purposes"]) == ("risk", ["credit_scoring"])


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
def test_version_depends_on_every_part(changes: dict[str, Any]) -> None:
    """Each part that governance or readers depend on changes the version."""
    assert view().version != view(**changes).version


def test_options_are_recorded_only_if_given() -> None:
    """So views of older releases keep their version."""
    assert set(view().definition()["source"]) == {"path", "event_timestamp", "created_timestamp"}
    declared, undeclared = (
        view(schema=[Field("amount", "float64", from_columns=columns)], transform=double).definition()
        for columns in (["gross", "tax"], [])
    )
    assert declared["schema"][0]["from_columns"] == ["gross", "tax"]
    assert "from_columns" not in undeclared["schema"][0]


def test_every_check_can_be_recorded_as_json() -> None:
    """Enums and time spans become JSON values, and the check can be rebuilt from them."""
    first_checks = [Unique(["person_id", "event_timestamp"], keep="first"), Freshness(timedelta(days=2))]
    checks = [*first_checks, Pattern("sector", "[a-z]+"), Outlier("amount"), RowCount(2.0), Drift("amount")]
    assert view(checks=checks).version != view().version
    assert [rule.definition() for rule in first_checks] == [
        {"check": "Unique", "of": ["person_id", "event_timestamp"], "keep": "first"},
        {"check": "Freshness", "maximum_age_s": 172800.0},
    ]
    assert [type(rule).from_definition(rule.definition()) for rule in checks] == checks


def test_version_with_older_checks_is_unchanged() -> None:
    """Checks of later releases do not change the version of views that do not use them."""
    checks = [NotNull("amount"), Range("amount", minimum=0), Allowed("sector", values=["a"])]
    assert view(checks=checks).version == "460fff526ed2"


def test_version_follows_constants_and_helpers_of_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing a constant in a helper function changes the version."""
    before = view(transform=double).version
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert view(transform=double).version != before


def test_service_version_follows_its_views_and_their_order() -> None:
    """Another order, another version of a view, or fewer views give another service version."""
    income, wealth = view(), replace(view(), name="wealth")
    versions = {
        FeatureService("credit", views=views).version
        for views in ([income, wealth], [wealth, income], [income], [replace(income, owner="x"), wealth])
    }
    assert len(versions) == 4
