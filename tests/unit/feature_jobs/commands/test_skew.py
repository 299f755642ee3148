"""Logged requests are compared with real tables: equal, late, missing and mismatched values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.security.keys.access import KeyAccess
from feature_jobs.skew import Materialization, Materializations, OpenedView, SkewResult, compare
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.skew.comparison import FeatureSkew
from feature_jobs.store.skew.served import read_served
from tests.projects.tables import commit_rows, feature_rows, pin, target_of
from tests.projects.views import make_spec, service_of

START = datetime(2024, 1, 1, tzinfo=UTC)
AS_OF, REQUESTED = START + timedelta(hours=20), START + timedelta(hours=21)


def hour(number: int) -> datetime:
    return START + timedelta(hours=number)


PERSON, COHORT = (
    make_spec("person", ["person_id"], band="string"),
    make_spec("cohort", ["band"], rate="float64"),
)
SERVICE = service_of(PERSON, COHORT)
ROWS = {
    "person": [(1, "old", 1), (2, "young", 1), (1, "young", 10)],
    "cohort": [("old", 0.5, 1), ("young", 0.25, 1), ("young", 0.75, 10)],
}
"""Key, value, and the hour of its event, created and ingestion times."""


class Tables:
    """The views' tables, and at most one materialisation, up to the `ingest_seq` `materialized_seq`."""

    def __init__(self, folder: Path, access: KeyAccess, *, materialized_seq: int | None) -> None:
        self._opened = {view.name: self._store(folder, access, view) for view in SERVICE.views}
        self._materializations = Materializations(
            []
            if materialized_seq is None
            else [Materialization(at=hour(20), seq=materialized_seq, as_of=hour(20))]
        )

    def open(self, view: ViewSpec) -> OpenedView:
        return OpenedView(self._opened[view.name], self._materializations)

    def _store(self, folder: Path, access: KeyAccess, spec: ViewSpec) -> Snapshot:
        keys, values, hours = zip(*ROWS[spec.name], strict=True)
        columns = {spec.join_keys[0]: pa.array(keys), spec.fields[0].name: pa.array(values)}
        rows = feature_rows([hour(number) for number in hours], **columns)
        target = target_of(f"{folder}/{spec.name}", spec, access)
        commit_rows(target, rows)
        return pin(target)


def compare_request(
    tables: Tables,
    *people: tuple[int, str | None, float | None],
    given: tuple[str, ...] = (),
    defaulted: dict[str, list[int]] | None = None,
) -> SkewResult:
    """Compare one logged request for some people: id, served band, served rate."""
    record: dict[str, Any] = {
        "prediction_id": "p",
        "time": REQUESTED.isoformat(),
        "as_of": AS_OF.isoformat(),
        "version": 1,
        "entities": [{"person_id": person} for person, _, _ in people],
        "features": {
            "person__band": [band for _, band, _ in people],
            "cohort__rate": [rate for _, _, rate in people],
        },
        "given": list(given),
        "defaulted": defaulted or {},
    }
    [group], *_ = read_served([record], since=None)
    result = SkewResult(rows=0, left_out=0, features=defaultdict(FeatureSkew), examples=[])
    compare(SERVICE, tables, group, result)  # type: ignore[arg-type]
    return result


def counts(result: SkewResult, feature: str) -> dict[str, int]:
    report = result.features[feature].report()
    return {name: value for name, value in report.items() if value and name not in ("compared", "smape")}


@pytest.fixture
def tables(tmp_path: Path, access: KeyAccess) -> Tables:
    return Tables(tmp_path, access, materialized_seq=None)


def test_values_of_the_newest_rows_are_equal(tables: Tables) -> None:
    """The second view is read by a feature of the first one. A person without rows on both sides is equal too."""
    result = compare_request(tables, (1, "young", 0.75), (2, "young", 0.75), (9, None, None))
    assert counts(result, "person__band") == {"equal": 3}
    assert counts(result, "cohort__rate") == {"equal": 3}
    assert (result.rows, result.mismatches, result.features["cohort__rate"].smape) == (3, 0, 0.0)


def test_late_key_feature_is_no_mismatch_of_the_view_read_by_it(tables: Tables) -> None:
    """The band was late, and the rate is right for the band that was served."""
    result = compare_request(tables, (1, "old", 0.5))
    assert counts(result, "person__band") == {"lag": 1}
    assert counts(result, "cohort__rate") == {"equal": 1}


def test_older_value_is_a_mismatch_after_the_newer_was_materialised(
    tmp_path: Path, access: KeyAccess
) -> None:
    """The online store had the newer value, but another one was served."""
    result = compare_request(
        Tables(tmp_path, access, materialized_seq=2), (1, "old", 0.5), (2, "young", 0.25)
    )
    assert counts(result, "person__band") == {"mismatch": 1, "equal": 1}
    assert counts(result, "cohort__rate") == {"equal": 1, "mismatch": 1}
    assert result.examples == [
        {"prediction_id": "p", "row": 0, "feature": "person__band"},
        {"prediction_id": "p", "row": 1, "feature": "cohort__rate"},
    ]


def test_value_on_only_one_side_is_missing_on_the_other(tables: Tables) -> None:
    """One person has no value online, the other has no rows offline."""
    result = compare_request(tables, (1, None, None), (9, "old", 0.5))
    assert counts(result, "person__band") == {"online_missing": 1, "offline_missing": 1}


def test_value_from_the_client_is_not_compared(tables: Tables) -> None:
    """The cohort is still read by the stored band, as it was online."""
    result = compare_request(tables, (1, "other", 0.75), given=("person__band",))
    assert "person__band" not in result.features
    assert counts(result, "cohort__rate") == {"equal": 1}


def test_default_is_no_mismatch(tables: Tables) -> None:
    """A default counts as a missing online value: equal if offline has none either."""
    defaulted = {"person__band": [0, 1], "cohort__rate": [0, 1]}
    result = compare_request(tables, (9, "none", -1.0), (1, "none", -1.0), defaulted=defaulted)
    assert counts(result, "person__band") == {"equal": 1, "online_missing": 1}
    assert counts(result, "cohort__rate") == {"equal": 2}
    assert result.mismatches == 0


def test_materializations_are_read_as_far_back_as_requests_need() -> None:
    """Each read one opens a table version, and a view may have years of them."""
    read: list[int] = []

    def newest_first() -> Iterator[Materialization]:
        for number in range(20, 0, -1):
            read.append(number)
            yield Materialization(at=hour(number), seq=number, as_of=hour(number))

    materializations = Materializations(newest_first())
    for requested, expected in ((18, 18), (20, 20), (19, 19), (23, 20)):
        found = materializations.last_before(hour(requested))
        assert found is not None
        assert found.seq == expected
    assert read == [20, 19, 18]
    assert materializations.last_before(hour(0)) is None
