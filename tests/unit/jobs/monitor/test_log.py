"""Monitoring reads both logs by columns, and knows which chunks have changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import RecordLogCorrupt
from cluster.placement import PlacementConfig
from cluster.records.columns import schema, to_row
from cluster.records.compaction import compact
from cluster.records.contents import segment_records
from cluster.records.location import LogLocation
from cluster.records.matching import match_outcomes
from cluster.records.reading import Outcome
from cluster.records.schema import SHADOW
from cluster.records.segments import SegmentWriter
from cluster.runtime import InputSpec, ModelSignature, OutcomeParser, Task
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess, key_store
from jobs.monitor.config import Period
from jobs.monitor.kept import KeptFiles
from jobs.monitor.log import decode, index, matching, units
from jobs.monitor.log.counts import LogCounts, count_logs
from jobs.monitor.log.index import HourCount, unseen_entities
from jobs.monitor.log.units import OpenLog
from tests.samples.record_log import OUTCOMES, PERSONAL, outcome, prediction
from tests.samples.signatures import of_each_task
from tests.servers.key_broker import running_broker

INPUTS = (
    InputSpec(name="age", dtype="float64"),
    InputSpec(name="rooms", dtype="int32"),
    InputSpec(name="city", dtype="string", categories=("a", "b")),
    InputSpec(name="owner", dtype="bool"),
)
BINARY, MULTICLASS, REGRESSION = of_each_task(*INPUTS)


@pytest.fixture(scope="module")
def access() -> Iterator[KeyAccess]:
    """A broker with the keys of both logs and of the model."""
    with running_broker(PERSONAL, OUTCOMES, "models/m") as access:
        yield access


def records_table(*records: Any) -> pa.Table:
    """Return prediction records as rows of the log's table."""
    rows = [to_row("predictions", "s", line, dataclasses.asdict(one)) for line, one in enumerate(records)]
    return pa.Table.from_pylist(rows, schema("predictions"))


def request(number: int, rows: list[tuple[Any, ...]], answers: list[dict[str, Any]], **changes: Any) -> Any:
    """Return the record of a request with some rows of inputs."""
    features = {spec.name: [row[position] for row in rows] for position, spec in enumerate(INPUTS)}
    return prediction(
        number,
        features=features,
        entities=[{"id": 1}] * len(rows),
        given=[],
        **{"predictions": answers} | changes,
    )


def answer_of(task: Task, score: float) -> dict[str, Any]:
    match task:
        case Task.binary:
            return {"label": "yes" if score > 0.5 else "no", "probability": score}
        case Task.multiclass:
            return {"label": "a", "probabilities": {"a": score, "b": 1 - score, "c": 0.0}}
        case Task.regression:
            return {"value": score}


USUAL = st.tuples(
    st.none() | st.floats(-1e6, 1e6),
    st.none() | st.integers(-(2**31), 2**31 - 1),
    st.none() | st.text(max_size=5),
    st.none() | st.booleans(),
)
ODD = st.tuples(
    *[
        st.one_of(
            st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(-9, 9), st.text(max_size=2)
        )
    ]
    * 4
)


@pytest.mark.parametrize("signature", [BINARY, MULTICLASS, REGRESSION], ids=lambda one: one.task.value)
@given(
    data=st.lists(
        st.tuples(st.lists(USUAL, min_size=1, max_size=3), st.floats(0, 1)), min_size=1, max_size=4
    ),
    odd=st.lists(ODD, max_size=1),
)
def test_a_table_is_decoded_at_once_as_record_by_record(
    signature: ModelSignature, data: list[Any], odd: list[Any]
) -> None:
    """Both ways give the same rows. A table with a value of another type is decoded record by record."""
    requests = [
        request(number, rows, [answer_of(signature.task, score)] * len(rows))
        for number, (rows, score) in enumerate([*data, *([(odd, 0.5)] if odd else [])])
    ]
    table = records_table(*requests)
    expected = decode._decode_each(table, signature)
    at_once = decode._decode_at_once(table, signature)
    if not odd:
        assert at_once is not None
        assert expected.odd_inputs == {}
    if at_once is not None:
        assert expected.odd_inputs == {}
        columns = sorted(expected.rows.columns)
        known = {name: at_once[name].dtype for name in columns if expected.rows[name].dtype != pl.Null}
        assert at_once.select(columns).rows() == expected.rows.select(columns).rows()
        assert known == {name: expected.rows[name].dtype for name in known}


def test_faults_and_null_scores_are_no_answers() -> None:
    """An old release logged a score that is not finite as null."""
    usual = request(1, [(1.0, 2, "a", True)], [answer_of(Task.binary, 0.75)])
    table = records_table(
        usual,
        request(2, [(1.0, 2, "a", True)], [], fault="the model failed"),
        request(3, [(1.0, 2, "a", True)], [{"label": "yes", "probability": None}]),
    )
    assert decode.decode(table, BINARY).rows["prediction_id"].to_list() == ["p1"]


VALUES = st.sampled_from(["no", "yes", "never", 3])


@given(
    received=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), VALUES, st.integers(0, 2)), max_size=12)
)
def test_outcomes_are_matched_as_by_the_records_themselves(received: list[tuple[int, int, Any, int]]) -> None:
    """The last valid outcome of a row is used. `cluster.records.matching`, one outcome at a time, is the oracle."""
    answers = decode.decode(
        records_table(
            *(
                request(number, [(1.0, 2, "a", True)] * 2, [answer_of(Task.binary, 0.5)] * 2)
                for number in (0, 1)
            )
        ),
        BINARY,
    ).rows
    truths = OutcomeParser(BINARY)
    in_order = sorted(received, key=lambda one: one[3])
    expected = match_outcomes(
        answers.with_columns(pl.lit(1).alias("version")),
        [Outcome(f"p{number}", row, value) for number, row, value, _ in in_order],
        {1: truths},
    )
    sent = [
        outcome(number, value, f"2026-01-0{day + 1}T00:00:00+00:00", row)
        for number, row, value, day in received
    ]
    rows = [to_row("outcomes", "s", line, dataclasses.asdict(one)) for line, one in enumerate(sent)]
    table = pa.Table.from_pylist(rows, schema("outcomes")).select(matching.COLUMNS)
    matched = matching.match(answers, pl.DataFrame(pl.from_arrow(table)), truths)
    for name in ("outcome", "odd_outcome"):
        assert matched.rows[name].to_list() == expected.answers[name].to_list()
    assert matched.unknown_rows == expected.unknown_rows


def test_an_entity_is_unseen_if_nothing_was_found_for_it() -> None:
    """Values that the client sent, and single nulls, do not make an entity unseen."""
    record = {
        "features": {"age": [None, 1.0, None], "city": ["d", None, "d"], "x": [1, 1, 1]},
        "given": ["x"],
    }
    assert unseen_entities(record | {"defaulted": {"city": [0]}}, 3) == 1
    assert unseen_entities(record | {"given": ["age", "city", "x"], "defaulted": {}}, 3) == 0


class Logs:
    """Both logs of a model, and what monitoring keeps of them."""

    def __init__(self, root: Path, access: KeyAccess) -> None:
        self.access = access
        self.places = {
            kind: LogLocation(name=f"{kind}/m", folder=root / kind / "m")
            for kind in ("predictions", "outcomes")
        }
        self.kept = KeptFiles(folder=f"{root}/monitor/m", model="m", store=key_store(access))

    def write(self, kind: str, *records: Any) -> None:
        key = PERSONAL if kind == "predictions" else OUTCOMES
        writer = SegmentWriter(self.places[kind].folder, store=key_store(self.access), key=key)
        writer.append(*records)
        writer.close()

    def count(self) -> LogCounts:
        return count_logs(
            self.places["predictions"],
            self.places["outcomes"],
            self.access,
            self.kept,
            PlacementConfig(),
            lambda: None,
        )

    def compact(self) -> None:
        for place in self.places.values():
            compact(place, store=key_store(self.access), files=protected_files(self.access))


def asked(number: int, day: int, **changes: Any) -> Any:
    """Return a request about a day of January, sent in February."""
    times = {"as_of": f"2026-01-{day:02}T00:00:00+00:00", "time": f"2026-02-{day:02}T10:30:00+00:00"}
    return request(number, [(1.0, 2, "a", True)], [answer_of(Task.binary, 0.75)], **times | changes)


@pytest.fixture
def logs(tmp_path: Path, access: KeyAccess) -> Logs:
    """Two segments of predictions of two days, with a shadow, a failure, and outcomes."""
    logs = Logs(tmp_path, access)
    logs.write("predictions", asked(0, 1), asked(1, 1), asked(2, 2))
    logs.write(
        "predictions",
        asked(3, 2),
        asked(4, 2, arm=SHADOW, variant=SHADOW),
        asked(5, 2, predictions=[], fault="the model failed"),
    )
    logs.write("outcomes", outcome(0, "yes"), outcome(2, "no"), outcome(9, "no"), outcome(9, "no"))
    return logs


def test_counts_by_chunk_and_hour(logs: Logs) -> None:
    """Shadows are in no chunk. A failed answer is a refused request, and counts as failed."""
    counts = logs.count()
    chunks = counts.chunks(Period.day)["champion", 1]
    assert {name: (sum(one.records.values()), one.answered) for name, one in chunks.items()} == {
        "2026-01-01": (2, 2),
        "2026-01-02": (3, 2),
    }
    assert {name: sum(one.outcomes.values()) for name, one in chunks.items()} == {
        "2026-01-01": 1,
        "2026-01-02": 1,
    }
    assert counts.failed("champion", 1) == 1
    assert counts.unknown_predictions == 1
    assert counts.hours() == {
        "2026-02-01T10": HourCount(requests=2, entities=2),
        "2026-02-02T10": HourCount(requests=3, refused=1, entities=3),
    }
    assert list(counts.chunks(Period.year)["champion", 1]) == ["2026"]


def test_only_new_records_and_outcomes_change_a_chunk(logs: Logs) -> None:
    """An outcome reopens the chunk of its prediction, even if it was unknown at first. Another day is not changed."""
    before = logs.count().chunks(Period.day)["champion", 1]
    assert logs.count().chunks(Period.day)["champion", 1] == before
    logs.write("outcomes", outcome(1, "no"))
    later = logs.count().chunks(Period.day)["champion", 1]
    assert later["2026-01-02"] == before["2026-01-02"]
    assert sum(later["2026-01-01"].outcomes.values()) == 2
    logs.write("predictions", asked(9, 2))
    last = logs.count()
    assert last.chunks(Period.day)["champion", 1]["2026-01-01"] == later["2026-01-01"]
    assert last.chunks(Period.day)["champion", 1]["2026-01-02"].answered == 3
    assert last.unknown_predictions == 0


def test_a_repeated_outcome_of_an_unknown_prediction_counts_once(logs: Logs) -> None:
    """It does not matter in which segments it is, or whether they are compacted. The prediction may come later."""
    assert logs.count().unknown_predictions == 1
    logs.write("outcomes", outcome(9, "no"))
    assert logs.count().unknown_predictions == 1
    logs.write("outcomes", outcome(8, "no"), outcome(9, "no"))
    assert logs.count().unknown_predictions == 2
    place = logs.places["outcomes"]
    compact(place, store=key_store(logs.access), files=protected_files(logs.access))
    assert logs.count().unknown_predictions == 2
    logs.write("outcomes", outcome(9, "yes"))
    logs.write("predictions", asked(9, 2))
    last = logs.count()
    assert last.unknown_predictions == 1
    assert sum(last.chunks(Period.day)["champion", 1]["2026-01-02"].outcomes.values()) == 6


def test_a_segment_that_is_compacted_after_the_listing_is_read_from_the_table(logs: Logs) -> None:
    """The table has the same lines."""
    log = OpenLog(logs.places["predictions"], logs.access)
    before = [log.read_segment(unit.name, index.COLUMNS) for unit in log.units]
    logs.compact()
    after = [log.read_segment(unit.name, index.COLUMNS) for unit in log.units]
    assert [table.num_rows for table in after] == [3, 3]
    assert [table.sort_by("line").to_pylist() for table in after] == [table.to_pylist() for table in before]


def test_a_segment_that_moves_between_search_and_opening_is_searched_again(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uploader may move it then. A segment that is nowhere is still an error."""
    log = OpenLog(logs.places["predictions"], logs.access)
    misses = [1, 1]

    def read_records(segment: Any, store: Any) -> Any:
        if misses:
            raise FileNotFoundError(misses.pop())
        return segment_records(segment, store)

    monkeypatch.setattr(units, "segment_records", read_records)
    assert log.read_segment(log.units[0].name, index.COLUMNS).num_rows == 3
    misses = [1] * 9
    with pytest.raises(RecordLogCorrupt, match="was deleted while it was read"):
        log.read_segment(log.units[0].name, index.COLUMNS)


def test_kept_counts_of_another_key_are_not_used(logs: Logs) -> None:
    """A changed file is as good as none: everything is counted again."""
    before = logs.count()
    path = Path(logs.kept.folder) / "index.sealed"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert logs.kept.read("index.sealed") == {}
    assert logs.count().prediction_index == before.prediction_index
