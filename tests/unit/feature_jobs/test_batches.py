"""The same content is stored once, and once more when the view would make something else of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from feature_jobs.store import Entity, FeatureView, Field, FileSource, NotNull, Sensitivity
from feature_jobs.store.batches import next_batch

PERSON = Entity("person", join_keys=["person_id"])
AMOUNT = Field("amount", "float64")
VIEW = FeatureView(
    "income",
    entities=[PERSON],
    source=FileSource("income.parquet", event_timestamp="at"),
    schema=[AMOUNT],
)


def batch(view: FeatureView, **said: Any) -> dict[str, Any]:
    """What the ledger says of content `d` in a view."""
    return {"view": "income", "view_version": view.version, "source_digest": "d", "ingest_id": "x"} | said


def next_of(
    view: FeatureView, *batches: dict[str, Any], known: Sequence[FeatureView], digest: str = "d"
) -> str | None:
    definitions = {("income", one.version): one.definition() for one in known}
    return next_batch(view.definition(), digest, batches=batches, definitions=definitions)


def ingested_again(view: FeatureView, before: FeatureView) -> bool:
    """Whether the content would be stored once more, after `before` had stored it."""
    return next_of(view, batch(before), known=[before]) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"owner": "risk"},
        {"ttl": timedelta(days=1)},
        {"purposes": ["credit"], "region": "eu", "retention": timedelta(days=9), "subject_key": "person_id"},
        {"schema": [replace(AMOUNT, description="in euro")]},
        {"source": FileSource("moved.parquet", event_timestamp="at")},
    ],
)
def test_content_is_stored_once_where_rows_would_be_the_same(changes: dict[str, Any]) -> None:
    """Who owns a view, or for how long a value counts, changes no row."""
    assert not ingested_again(replace(VIEW, **changes), VIEW)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": [AMOUNT, Field("sector", "string")]},
        {"schema": [replace(AMOUNT, sensitivity=Sensitivity.PERSONAL)]},
        {"checks": [NotNull("amount")]},
        {"source": FileSource("income.parquet", event_timestamp="at", created_timestamp="known")},
        {"created_lag": timedelta(days=1)},
    ],
)
def test_content_is_stored_again_where_rows_would_differ(changes: dict[str, Any]) -> None:
    """A new column is filled by ingesting the old files again."""
    assert ingested_again(replace(VIEW, **changes), VIEW)


def test_other_content_is_another_batch() -> None:
    """Of the same view."""
    assert next_of(VIEW, batch(VIEW), known=[VIEW], digest="e") is not None
    assert next_of(VIEW, batch(VIEW) | {"view": "other"}, known=[VIEW]) is not None


def test_id_is_the_same_until_the_ledger_knows_of_the_batch() -> None:
    """A run that was killed after its commit finds it again, also when only the owner changed meanwhile."""
    assert next_of(VIEW, known=[VIEW]) == next_of(replace(VIEW, owner="risk"), known=[VIEW])


def test_going_back_to_an_earlier_definition_stores_its_rows_again() -> None:
    """Else the rows of the version between would go on counting."""
    other = replace(VIEW, checks=[NotNull("amount")])
    first, second = batch(VIEW, ingest_id="1"), batch(other, ingest_id="2")
    known = [VIEW, other]
    ids = [
        next_of(VIEW, known=known),
        next_of(other, first, known=known),
        next_of(VIEW, first, second, known=known),
    ]
    assert None not in ids
    assert len(set(ids)) == 3
    assert next_of(VIEW, first, second, batch(VIEW, ingest_id="3"), known=known) is None
