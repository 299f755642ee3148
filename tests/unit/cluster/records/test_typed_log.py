"""Tests of reading a log in the types of its models, and of counting values without a type or a meaning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.records.compaction import compact
from cluster.records.matching import match_outcomes
from cluster.records.reading import INVALID_OUTCOME, iter_outcomes, read_log, read_outcomes, read_predictions
from cluster.records.segments import SegmentWriter
from cluster.records.signature_types import to_typed_rows
from cluster.runtime import InputSpec, OutcomeParser, Task
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.keyring import Keyring
from tests.samples.record_log import FLAGS, LATER, OUTCOMES, PERSONAL, answer, outcome

LARGE = 2**53 + 1


def write(folder: Path, keyring: Keyring, *records: Any, compacted: bool = False) -> None:
    writer = SegmentWriter(
        folder, store=keyring, key=PERSONAL if folder.parts[-2] == "predictions" else OUTCOMES
    )
    writer.append(*records)
    writer.close()
    if compacted:
        compact(folder, store=keyring, files=ProtectedFiles(keyring))


@pytest.mark.parametrize("compacted", [False, True])
def test_value_of_another_type_does_not_change_other_values(
    log: Path, keyring: Keyring, compacted: bool
) -> None:
    """It is counted and becomes null. Integers beyond 2^53 keep all digits."""
    records = [answer(1, LARGE, 7.0), answer(2, 1.5), answer(3, "x"), answer(4, True), answer(5, 2**63)]
    write(log, keyring, *records, answer(6, "old", version=2), compacted=compacted)
    answers = read_predictions(log, keyring)
    version_rows = to_typed_rows(answers.filter(version=1), FLAGS)
    assert version_rows.rows["x"].to_list() == [LARGE, 7, None, None, None, None]
    assert version_rows.num_invalid == {"x": 4}
    texts = replace(FLAGS, inputs=(InputSpec(name="x", dtype="string", categories=("old",)),))
    assert to_typed_rows(answers.filter(version=2), texts).rows["x"].to_list() == ["old"]


def test_input_that_no_record_has_is_null(log: Path, keyring: Keyring) -> None:
    write(log, keyring, answer(1, 5, name="other"))
    assert to_typed_rows(read_predictions(log, keyring), FLAGS).rows["x"].to_list() == [None]


@pytest.mark.parametrize("name", ["arm", "rollout", "version", "label", "probability", "row", "outcome"])
def test_input_with_a_reserved_name_is_left_out(log: Path, keyring: Keyring, name: str) -> None:
    """A client chooses an input's value, and could change an answer's arm or label."""
    write(log, keyring, answer(1, 5, name=name, rollout="r", arm="treatment"))
    signature = replace(FLAGS, inputs=(InputSpec(name=name, dtype="int64"),))
    version_rows = to_typed_rows(read_predictions(log, keyring), signature)
    assert version_rows.rows.select("arm", "rollout", "version", "label", "probability", "row").rows() == [
        ("treatment", "r", 1, True, 0.75, 0)
    ]


def test_probabilities_are_read_by_each_versions_classes(log: Path, keyring: Keyring) -> None:
    for version, classes in ((1, ("a", "b", "c")), (2, ("b", "c", "d"))):
        shares = dict(zip(classes, (0.25, 0.5, 0.25), strict=True))
        answers = [{"probabilities": shares, "label": classes[1]}]
        write(log, keyring, answer(version, 5, version=version, predictions=answers))
    signature = replace(FLAGS, task=Task.multiclass, classes=("b", "c", "d"))
    version_rows = to_typed_rows(read_predictions(log, keyring).filter(version=2), signature).rows
    assert version_rows["probabilities"].to_list() == [{"b": 0.25, "c": 0.5, "d": 0.25}]
    assert version_rows["label"].to_list() == ["c"]


@pytest.mark.parametrize("compacted", [False, True])
def test_row_without_a_score_is_a_failure_and_no_answer(log: Path, keyring: Keyring, compacted: bool) -> None:
    """An older release wrote NaN as null, with a label. Such a row is a failure, too."""
    old = [{"probability": None, "label": False}, {"probability": 0.5, "label": True}]
    older = [{"probabilities": {"a": None, "b": None}, "label": "a"}]
    write(
        log,
        keyring,
        answer(1, 1, 2, predictions=[], fault="gave no finite score for 1 of 2 rows"),
        answer(2, 3, 4, predictions=old),
        answer(3, 5, predictions=older),
        answer(4, 6, predictions=[{"value": None}]),
        compacted=compacted,
    )
    model_log = read_log(log, keyring)
    assert model_log.answers.select("prediction_id", "row").rows() == [("p2", 1)]
    assert model_log.failures.select("prediction_id", "row", "fault").rows() == [
        ("p1", 0, "gave no finite score for 1 of 2 rows"),
        ("p1", 1, "gave no finite score for 1 of 2 rows"),
        ("p2", 0, "no finite score"),
        ("p3", 0, "no finite score"),
        ("p4", 0, "no finite score"),
    ]


@pytest.mark.parametrize("compacted", [False, True])
def test_invalid_and_unknown_outcomes_are_counted_and_change_no_others(
    log: Path, outcomes: Path, keyring: Keyring, compacted: bool
) -> None:
    write(log, keyring, answer(1, 1, 2), answer(2, 3), answer(3, 4), answer(4, 5))
    posted = [outcome(1, True), outcome(1, 0, row=1), outcome(77, "true"), outcome(1, True, row=5)]
    posted += [outcome(2, "maybe"), outcome(3, "maybe"), outcome(3, False, LATER)]
    posted += [outcome(4, True), outcome(4, "maybe", LATER)]
    write(outcomes, keyring, *posted, compacted=compacted)
    matched = match_outcomes(
        read_predictions(log, keyring), iter_outcomes(outcomes, keyring), {1: OutcomeParser(FLAGS)}
    )
    assert matched.answers["outcome"].to_list() == [True, False, None, False, True]
    assert matched.answers[INVALID_OUTCOME].to_list() == [False, False, True, False, True]
    assert (matched.unknown_predictions, matched.unknown_rows) == (1, 1)
    known = {(prediction_id, row): value for prediction_id, row, value in read_outcomes(outcomes, keyring)
        .select("prediction_id", "row", "outcome").rows()}  # fmt: skip
    assert (known["p1", 0], known["p77", 0]) == (True, "true")


def test_outcomes_of_other_versions_are_ignored(log: Path, outcomes: Path, keyring: Keyring) -> None:
    """Such outcomes are counted neither as unknown nor as invalid."""
    write(log, keyring, answer(1, 1), answer(2, 2, version=2))
    write(outcomes, keyring, outcome(1, True), outcome(2, "high"))
    matched = match_outcomes(
        read_predictions(log, keyring), iter_outcomes(outcomes, keyring), {1: OutcomeParser(FLAGS)}
    )
    assert matched.answers.select("prediction_id", "outcome", INVALID_OUTCOME).rows() == [("p1", True, False)]
    assert (matched.unknown_predictions, matched.unknown_rows) == (0, 0)


def test_answers_without_outcomes_are_matched(log: Path, outcomes: Path, keyring: Keyring) -> None:
    write(log, keyring, answer(1, 1), answer(2, 2))
    assert list(iter_outcomes(outcomes, keyring)) == []
    assert read_outcomes(outcomes, keyring).is_empty()
    matched = match_outcomes(
        read_predictions(log, keyring), iter_outcomes(outcomes, keyring), {1: OutcomeParser(FLAGS)}
    )
    assert matched.answers["outcome"].to_list() == [None, None]
    assert (matched.unknown_predictions, matched.unknown_rows) == (0, 0)
