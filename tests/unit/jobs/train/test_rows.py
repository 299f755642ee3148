"""Rows of a protected training set: read by row groups, in an order that only seed and position determine."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import TrainingSetError
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import Protection
from feature_jobs.store.offline.row_hash import row_hash
from jobs.train.config import LearningConfig, SplitConfig
from jobs.train.data import TrainingSet, prepare
from jobs.train.rows.batches import RowReader
from jobs.train.rows.encoded import EncodedRows, GroupCache, Part
from jobs.train.rows.file import RowFile
from jobs.train.rows.order import windows_of
from jobs.train.split import mix
from jobs.train.training_data import count_conflicts, prepare_rows
from tests.unit.jobs.train.conftest import GROUP_ROWS, ROWS, people


def config(**changes: Any) -> LearningConfig:
    return LearningConfig(**{"name": "m", "training_set": "t", "label": "y"} | changes)


def streamed(row_file: RowFile) -> TrainingSet:
    return TrainingSet(table=row_file, manifest={}, hash="h")


@given(
    group_rows=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    epoch=st.integers(0, 3),
    window_rows=st.integers(1, 80),
)
def test_windows_cover_each_row_once(group_rows: list[int], epoch: int, window_rows: int) -> None:
    """They follow each other without a gap. Only the last one may be smaller than asked for."""
    windows = windows_of(group_rows, seed=3, epoch=epoch, window_rows=window_rows)
    assert sum(window.rows for window in windows) == sum(group_rows)
    position = 0
    for window in windows:
        assert window.start == position
        assert sorted(window.order()) == list(range(window.rows))
        position = window.end
    assert all(window.rows >= window_rows for window in windows[:-1])


def test_a_protected_file_gives_the_same_data_as_a_table_in_memory(row_file: RowFile) -> None:
    """Signature, matrix, target and split are equal, although no step reads more than a column or a row group."""
    table = TrainingSet(table=people(), manifest={}, hash="h")
    expected, data = prepare(config(), table), prepare_rows(config(), streamed(row_file))
    assert len(row_file.group_sizes) == -(-ROWS // GROUP_ROWS)
    assert data.signature == expected.signature
    groups = list(pickle.loads(pickle.dumps(data.rows)).groups())  # noqa: S301 (as a worker gets it)
    assert np.array_equal(np.concatenate([group.matrix for group in groups]), expected.matrix, equal_nan=True)
    assert np.array_equal(np.concatenate([group.target for group in groups]), expected.target)
    assert np.array_equal(data.held_out, expected.held_out)
    assert np.array_equal(data.fit, expected.fit)
    fit = expected.matrix[expected.fit].astype(np.float64)
    assert data.statistics.means == pytest.approx(np.nanmean(fit, axis=0), rel=1e-12)
    assert data.statistics.spreads == pytest.approx(np.nanstd(fit, axis=0), rel=1e-12)
    assert row_hash(row_file) == row_hash(people())


def batches(rows: EncodedRows, *, epoch: int = 0, first: int = 0, steps: int = 40) -> list[np.ndarray]:  # type: ignore[type-arg]
    reader = RowReader(rows, seed=1, window_rows=1000)
    return [
        np.c_[batch.matrix, batch.target]
        for batch in reader.batches(epoch, first_step=first, steps=steps, batch_rows=64)
    ]


def test_a_step_has_the_same_rows_wherever_the_run_continues(row_file: RowFile) -> None:
    """Also behind the end of a window. Another epoch or seed has another order, and an epoch repeats no row."""
    rows = prepare_rows(config(), streamed(row_file)).rows
    whole = batches(rows)
    assert [len(batch) for batch in whole] == [64] * 40
    for first in (1, 13, 16, 39, 40):
        continued = batches(rows, first=first)
        assert len(continued) == 40 - first
        assert all(
            np.array_equal(a, b, equal_nan=True) for a, b in zip(continued, whole[first:], strict=True)
        )
    assert not np.array_equal(batches(rows, epoch=1)[0], whole[0], equal_nan=True)
    ages = np.concatenate(whole)[:, 0]
    known = ages[~np.isnan(ages)]
    assert len(np.unique(known)) == len(known)


def test_validation_rows_are_divided_among_the_workers(row_file: RowFile) -> None:
    """Each row is evaluated by one worker. All workers know the largest number of steps of one of them."""
    rows = prepare_rows(config(), streamed(row_file)).rows
    reader = RowReader(rows, seed=0)
    parts = [list(reader.validation(rank=rank, workers=3)) for rank in range(3)]
    assert sum(len(batch.target) for part in parts for batch in part) == int(
        (rows.parts == Part.validation).sum()
    )
    assert reader.validation_steps(workers=3) == max(map(len, parts))


def test_a_file_that_was_replaced_after_the_check_is_refused(row_file: RowFile) -> None:
    """A worker reads exactly the rows that the driver checked, even if the new file has the right keys."""
    rows = prepare_rows(config(), streamed(row_file)).rows
    table = people().set_column(1, "age", pa.array(np.zeros(ROWS)))
    protected_files(row_file.access).write(
        table, row_file.uri, Protection(default="rows"), row_group_rows=GROUP_ROWS
    )
    with pytest.raises(TrainingSetError, match="changed while the job ran"):
        rows.read(0)


def test_a_cache_keeps_a_bounded_number_of_groups(row_file: RowFile) -> None:
    """The first groups are not read again. Others do not take their place, because an epoch reads each group once."""
    cache = GroupCache(prepare_rows(config(), streamed(row_file)).rows, max_bytes=3 * GROUP_ROWS * 16)
    first = cache.read(0)
    assert cache.read(0) is first
    for group in (1, 2, 3):
        cache.read(group)
    assert cache.read(0) is first
    assert cache.read(3) is not cache.read(3)


def test_validation_rows_are_kept(row_file: RowFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch does not read their groups again. Rows for which there is no room are read each time."""
    rows = prepare_rows(config(), streamed(row_file)).rows
    for room in (2**20, 0):
        monkeypatch.setattr("jobs.train.rows.batches.VALIDATION_BYTES", room)
        reader = RowReader(rows, seed=0)
        first = list(reader.validation(rank=0, workers=2))
        second = list(reader.validation(rank=0, workers=2))
        for one, other in zip(first, second, strict=True):
            assert one.matrix.tobytes() == other.matrix.tobytes()
        assert bool(reader._validation) is bool(room)


START = datetime(2025, 1, 1, tzinfo=UTC)


def dated(**columns: Any) -> TrainingSet:
    """Return 100 people, one row a day."""
    base = {
        "person_id": np.arange(100),
        "event_timestamp": pa.array([START + timedelta(days=n) for n in range(100)]),
        "age": np.arange(100.0),
        "y": np.arange(100) % 2,
    }
    return TrainingSet(
        table=pa.table(base | columns),
        manifest={"columns": [{"name": "age"}]},
        hash="h",
        join_keys=("person_id",),
        built_at="2025-04-01T00:00:00+00:00",
    )


def test_rows_from_a_time_on_are_held_out() -> None:
    """The split by time does not look at the join key."""
    data = prepare_rows(config(split=SplitConfig(from_time="2025-03-02")), dated())
    assert np.flatnonzero(data.held_out).tolist() == list(range(60, 100))


def test_another_seed_holds_out_other_entities() -> None:
    """The values of the join key are hashed with the seed, so an entity's rows stay together."""
    masks = [prepare_rows(config(split=SplitConfig(seed=seed)), dated()).held_out for seed in (0, 1)]
    assert [10 < mask.sum() < 40 for mask in masks] == [True, True]
    assert not np.array_equal(*masks)
    assert mix(np.array([0, 1]), seed=0).tolist() == [16294208416658607535, 10451216379200822465]


def test_rows_with_an_open_outcome_window_are_not_used() -> None:
    """On 1 April, a window of 30 days is open for the rows of March. Without a known time, the setting is refused."""
    data = prepare_rows(config(outcome_window_days=30), dated())
    assert np.flatnonzero(data.unused).tolist() == list(range(61, 100))
    data = prepare_rows(config(outcome_window_days=30, outcomes_until="2025-05-01"), dated())
    assert np.flatnonzero(data.unused).tolist() == list(range(91, 100))
    unknown = TrainingSet(table=dated().table, manifest={}, hash="h")
    with pytest.raises(TrainingSetError, match="outcomes_until"):
        prepare_rows(config(outcome_window_days=30), unknown)


def test_conflicting_labels_are_counted() -> None:
    """Two rows of the same entity and time with different labels are two conflicting rows."""
    keys = np.arange(100)
    keys[1] = 0
    at = [START + timedelta(days=n) for n in range(100)]
    at[1] = at[0]
    source = dated(person_id=keys, event_timestamp=pa.array(at))
    assert count_conflicts(source, source.table["y"].to_numpy()) == 2
    assert count_conflicts(source, np.zeros(100)) == 0
