"""Checks of a whole batch or against the last good batch: profiles, uniqueness, outliers, drift."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.store import (
    Drift,
    FeatureView,
    Field,
    FileSource,
    Freshness,
    Keep,
    NotNull,
    NullShare,
    Outlier,
    Range,
    RowCount,
    Unique,
)
from feature_jobs.store.definitions.batch_checks import BatchCheck, Facts, stability_index
from feature_jobs.store.ingestion import profiling
from feature_jobs.store.ingestion.validation import (
    RAW,
    REASON,
    SOURCE,
    find_repeated_rows,
    prepare,
    prepare_part,
    reject,
)
from feature_jobs.store.types.batch_profile import Profile
from tests.projects.views import make_view

NOW = datetime(2024, 6, 1, tzinfo=UTC)
AT = datetime(2024, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def view(*checks: Any) -> FeatureView:
    return make_view(schema=[Field("amount", "float64"), Field("sector", "string")], checks=checks)


def batch(amount: Any, sector: Any = None, *, keys: Any = None, at: datetime = AT) -> pa.Table:
    count = len(amount)
    return pa.table(
        {
            "person_id": pa.array(range(count) if keys is None else keys, pa.int64()),
            "amount": pa.array(amount, pa.float64()),
            "sector": pa.array(["a"] * count if sector is None else sector, pa.string()),
            "at": pa.array([at] * count, pa.timestamp("us", "UTC")),
        }
    )


def measured(*blocks: pa.Table, of: FeatureView | None = None, under: Profile | None = None) -> Any:
    """Return the profile of a batch in these blocks, and its counts in the bins of another profile."""
    of = of or view()
    prepared = [prepare(block, of, now=NOW) for block in blocks]
    good = [block.filter(pc.is_null(block[REASON])) for block in prepared]
    sketches = [profiling.sketch(block, rows, of.schema) for block, rows in zip(prepared, good, strict=True)]
    chosen = profiling.choose_bins(sketches)
    profile = profiling.profile(sketches, chosen, [profiling.count(rows, chosen) for rows in good])
    known = under.distributions if under else {}
    return profile, profiling.add_counts(profiling.count(rows, known) for rows in good)


def finding(rule: BatchCheck, after: pa.Table, before: pa.Table | None = None) -> Any:
    baseline = None if before is None else measured(before)[0]
    profile, counts = measured(after, under=baseline)
    return rule.finding(Facts(batch=profile, baseline=baseline, counts=counts, now=NOW))


@pytest.mark.parametrize(("keep", "bad"), [(Keep.none, [1, 1, 0, 0, 0]), (Keep.first, [0, 1, 0, 0, 0])])
def test_repeated_rows_go_to_quarantine(keep: Keep, bad: list[int]) -> None:
    """All of them, or all but the first. Rows with a null are never repeated."""
    rule = Unique(["person_id", "sector"], keep=keep)
    rows = batch([1.0] * 5, ["a", "a", "b", None, None], keys=[1, 1, 1, 2, 2])
    found = prepare(rows, view(rule), now=NOW)
    assert [int(reason is not None) for reason in found[REASON].to_pylist()] == bad
    assert SOURCE not in found.column_names


def test_rejected_row_keeps_its_source_values() -> None:
    """This is the same for every other reason."""
    found = prepare(batch([1.0, 2.0], keys=[1, 1]), view(Unique(["person_id"], keep=Keep.first)), now=NOW)
    assert json.loads(found[RAW][1].as_py())["amount"] == 2.0
    assert found[RAW][0].as_py() is None
    assert found[REASON][1].as_py() == "person_id not unique in the batch"


def test_a_bad_row_does_not_count_as_the_first() -> None:
    """Otherwise a good row would be rejected because of a row that is not stored."""
    rules = view(Unique(["person_id"], keep=Keep.first), Range("amount", minimum=0))
    reasons = prepare(batch([-1.0, 1.0], keys=[1, 1]), rules, now=NOW)[REASON].to_pylist()
    assert reasons == ["amount outside 0..", None]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b", None])), min_size=1, max_size=12),
    st.integers(0, 12),
    st.sampled_from(list(Keep)),
)
def test_result_does_not_depend_on_blocks(rows: list[tuple[int, str | None]], cut: int, keep: Keep) -> None:
    """The boundaries of Ray's blocks have no effect."""
    rule = Unique(["person_id", "sector"], keep=keep)
    whole = batch([1.0] * len(rows), [row[1] for row in rows], keys=[row[0] for row in rows])
    parts = [prepare_part(part, view(rule), now=NOW) for part in (whole.slice(0, cut), whole.slice(cut))]
    failing = find_repeated_rows(parts, rule)
    pairs = zip(parts, failing, strict=True)
    settled = pa.concat_tables([reject(part, mask, rule.reason) for part, mask in pairs])
    assert prepare(whole, view(rule), now=NOW).equals(settled.drop_columns([SOURCE]))


def test_a_value_far_outside_the_last_good_batch_is_a_bad_row() -> None:
    """Quartiles 25 and 75 give the bounds -125 and 225, both included. Null passes."""
    baseline, _ = measured(batch(np.arange(101.0)))
    rows = batch([-125.0, -126.0, 225.0, 226.0, None])
    found = prepare(rows, view(Outlier("amount")), now=NOW, baseline=baseline)
    assert [reason is not None for reason in found[REASON].to_pylist()] == [False, True, False, True, False]


@pytest.mark.parametrize("before", [None, [7.0] * 100, [None] * 5])
def test_no_value_is_an_outlier_without_a_range(before: list[float | None] | None) -> None:
    """For a first batch, a constant column and an empty batch."""
    baseline = None if before is None else measured(batch(before))[0]
    found = prepare(batch([1e9]), view(Outlier("amount")), now=NOW, baseline=baseline)
    assert found[REASON].to_pylist() == [None]


@given(st.lists(st.lists(st.floats(-1e6, 1e6) | st.none(), max_size=20), min_size=1, max_size=3))
def test_counts_of_a_profile_are_exact(blocks: list[list[float | None]]) -> None:
    """Every good value is in one bin, for any division into blocks."""
    tables = [batch(block) for block in blocks]
    profile, _ = measured(*tables)
    values = [value for block in blocks for value in block if value is not None]
    assert profile.rows_in == sum(map(len, blocks))
    assert profile.nulls["amount"] == profile.rows_in - len(values)
    if values:
        one = profile.distributions["amount"]
        inside = np.digitize(values, one.edges, right=True)
        assert one.counts == np.bincount(inside, minlength=len(one.edges) + 1).tolist()
        assert one.quartiles[0] <= one.quartiles[1] <= one.quartiles[2]


def test_deciles_of_many_blocks_are_near_those_of_the_whole() -> None:
    """The difference in rank is at most 1/256, for any size and order of blocks."""
    values = np.random.default_rng(1).lognormal(size=30_000)
    profile, _ = measured(batch(np.sort(values)[:20_000]), batch(np.sort(values)[20_000:]))
    shares = np.cumsum(profile.distributions["amount"].counts[:-1]) / len(values)
    assert np.abs(shares - np.arange(1, 10) / 10).max() < 2 / 256


def test_merged_sketches_give_the_same_profile_and_are_no_larger() -> None:
    """Counts are exact. Deciles are near those of the whole, for blocks of any size."""
    values = np.random.default_rng(2).lognormal(size=30_000)
    cuts = [0, 100, 150, 20_000, 20_000, 30_000]
    blocks = [
        prepare(
            batch(values[start:end], [f"n{number % 20_000}" for number in range(start, end)]), view(), now=NOW
        )
        for start, end in pairwise(cuts)
    ]
    merged = profiling.merge([profiling.sketch(block, block, view().schema) for block in blocks])
    assert (merged.rows, merged.nulls["amount"]) == (30_000, 0)
    assert len(merged.numbers["amount"].points) == profiling.SKETCH_POINTS
    assert len(merged.categories["sector"]) == profiling.MAX_COUNTED
    edges = profiling.choose_bins([merged])["amount"].edges
    assert edges is not None
    shares = np.searchsorted(np.sort(values), edges) / len(values)
    assert np.abs(shares - np.arange(1, 10) / 10).max() < 3 / 256
    few = profiling.merge([profiling.sketch(block, block, view().schema) for block in blocks[:2]])
    assert few.numbers["amount"].points.tolist() == sorted(values[:150])


def test_profile_is_bounded_and_survives_json() -> None:
    """A column with many different names does not store all of them."""
    names = [f"n{number % 500}" for number in range(5000)]
    profile, _ = measured(batch(np.arange(5000.0), names))
    one = profile.distributions["sector"]
    assert (len(one.categories), len(one.counts), sum(one.counts)) == (50, 51, 5000)
    assert Profile.from_json(profile.to_json()) == profile


def test_ledger_gets_no_values_of_a_profile() -> None:
    """It gets counts only, not even categories."""
    profile, _ = measured(batch([1234.5] * 20, ["secret"] * 20))
    assert profile.summary() == {"rows_in": 20, "rows": 20, "nulls": {"amount": 0, "sector": 0}}


def test_null_share_counts_rows_that_went_to_quarantine() -> None:
    """A broken source is visible in these rows first."""
    strict = view(NotNull("amount"))
    profile, counts = measured(batch([1.0, None, None, 1.0]), of=strict)
    facts = Facts(batch=profile, baseline=None, counts=counts, now=NOW)
    assert NullShare("amount", 0.5).finding(facts) is None
    found = NullShare("amount", 0.4).finding(facts)
    assert found is not None
    assert (found.value, found.threshold) == (0.5, 0.4)
    assert found.said == "50.0% of 'amount' are null, at most 40.0% may be"


def test_nulls_of_tombstones_do_not_count() -> None:
    """A batch with many deletions is not a broken source."""
    source = FileSource("x.parquet", event_timestamp="at", deleted="gone")
    with_ends = dataclasses.replace(view(), source=source)
    ends = batch([1.0, None, None]).append_column("gone", pa.array([False, True, False]))
    profile, _ = measured(ends, of=with_ends)
    assert profile.nulls == {"amount": 1, "sector": 0}


def test_freshness_is_the_age_of_the_newest_event() -> None:
    """An age equal to the maximum passes."""
    rule = Freshness(10 * DAY)
    assert finding(rule, batch([1.0], at=NOW - 10 * DAY)) is None
    late = finding(rule, batch([1.0], at=NOW - 10 * DAY - timedelta(seconds=1)))
    assert (late.value, late.threshold) == (864_001.0, 864_000.0)


@pytest.mark.parametrize(("rows", "passes"), [(49, False), (50, True), (200, True), (201, False)])
def test_row_count_may_change_by_a_factor_both_ways(rows: int, passes: bool) -> None:
    """The number of rows may be half to twice that of the last valid batch, which has 100 rows."""
    assert (finding(RowCount(2.0), batch([1.0] * rows), batch([1.0] * 100)) is None) == passes
    assert finding(RowCount(2.0), batch([1.0] * rows)) is None


def test_stability_index_is_that_of_the_formula() -> None:
    """Shares 50:50 and 75:25 give 0.25 ln 1.5 + 0.25 ln 2, and equal shares give 0."""
    many, expected = 10**9, 0.25 * np.log(1.5) + 0.25 * np.log(2)
    assert stability_index([many, many], [3 * many, many]) == pytest.approx(expected)
    assert stability_index([5, 7], [5, 7]) == 0


def test_drift_of_numbers_and_of_categories_is_found() -> None:
    """A shift by one standard deviation, and a new category with half of the rows."""
    random = np.random.default_rng(2)
    before = batch(random.normal(size=2000), ["a", "b"] * 1000)
    moved = batch(random.normal(1, size=2000), ["a", "c"] * 1000)
    assert finding(Drift("amount"), moved, before).value > 0.5
    assert finding(Drift("sector"), moved, before).value > 0.5
    assert finding(Drift("amount"), moved) is None


def test_small_batches_are_seldom_refused_by_chance() -> None:
    """Fifty rows of the same distribution often have an index above the threshold, but are accepted."""
    random = np.random.default_rng(3)
    refused = above = 0
    for _ in range(100):
        baseline, _ = measured(batch(random.normal(size=50)))
        profile, counts = measured(batch(random.normal(size=50)), under=baseline)
        facts = Facts(batch=profile, baseline=baseline, counts=counts, now=NOW)
        refused += Drift("amount", 0.1).finding(facts) is not None
        above += stability_index(baseline.distributions["amount"].counts, counts["amount"]) > 0.1
    assert above > 50
    assert refused <= 2


def test_feature_with_another_type_is_not_compared() -> None:
    """A view's next version may have another type under the same name, or no such feature."""
    baseline, _ = measured(batch([1.0] * 9, ["a"] * 9))
    good = pa.table({"amount": pa.array(["x"])})
    assert profiling.count(good, baseline.distributions) == {}
