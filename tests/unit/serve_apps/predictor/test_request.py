"""Parsing of requests: everything else is a 400 that names the field."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InvalidRequest
from cluster.records.reading import read_outcomes
from cluster.records.segments import SegmentWriter
from cluster.runtime import InputSpec
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo, KeyStoreUnavailable
from feature_jobs.store.catalog.specifications import FieldSpec
from serve_apps.outcomes.outcomes import parse_outcomes
from serve_apps.predictor.request import parse_predict
from serve_apps.replica.http import MAX_MESSAGE, refusal
from serve_apps.replica.http_contract import TRY_ANOTHER

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
AGE = InputSpec(name="p__age", dtype="float64")
SEX = InputSpec(name="p__sex", dtype="string", categories=("1", "2"))
COUNT = InputSpec(name="p__count", dtype="int64")
TINY = InputSpec(name="p__tiny", dtype="int8", categories=(1, 2))
FLAG = InputSpec(name="p__flag", dtype="bool")
INPUTS = {spec.name: spec for spec in (AGE, SEX, COUNT, TINY, FLAG)}


def test_predict_request_with_an_override_and_as_of() -> None:
    """One value applies to all entities; an instant without a zone is UTC."""
    body = {"entities": [{"id": 1}, {"id": 2}], "features": {"p__age": 41}, "as_of": "2016-12-31"}
    request = parse_predict(body, INPUTS, now=NOW)
    assert request.overrides == {"p__age": [41, 41]}
    assert request.as_of == dt.datetime(2016, 12, 31, tzinfo=dt.UTC)
    assert parse_predict({"entities": [{"id": 1}]}, INPUTS, now=NOW).as_of == NOW


def test_integers_are_accepted_in_both_json_forms() -> None:
    """50.0 is 50; beside it, 2^53 + 1 keeps its digits."""
    body = {"entities": [{"id": 1}] * 3, "features": {"p__count": [50.0, 2**53 + 1, None]}}
    values = parse_predict(body, INPUTS, now=NOW).overrides["p__count"]
    assert (values, list(map(type, values))) == ([50, 2**53 + 1, None], [int, int, type(None)])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "entities"),
        ({"entities": []}, "entities"),
        ({"entities": [{}]}, r"entities\[0\]"),
        ({"entities": [{"id": 1.5}]}, r"entities\[0\].id"),
        ({"entities": [{"id": True}]}, r"entities\[0\].id"),
        ({"entities": [{"id": 2**64}]}, "64 bits"),
        ({"entities": [{"id": 1}] * 1001}, "at most 1000"),
        ({"entities": [{"id": 1}], "feature": {}}, "Did you mean 'features'"),
        ({"entities": [{"id": 1}], "as_of": "yesterday"}, "as_of"),
        ({"entities": [{"id": 1}], "as_of": 5}, "as_of"),
        ({"entities": [{"id": 1}], "as_of": "0001-01-01T00:00:00+14:00"}, "as_of"),
        ({"entities": [{"id": 1}], "features": []}, "must be an object"),
    ],
)
def test_wrong_fields_are_refused_by_name(body: dict[str, Any], message: str) -> None:
    """The message has the field and what is expected."""
    with pytest.raises(InvalidRequest, match=message):
        parse_predict(body, INPUTS, now=NOW)


def test_message_quotes_only_the_beginning_of_a_value() -> None:
    """For a very long name, the message suggests no other name."""
    for body in (
        {"entities": [{"id": 1}], "features": {"p__age": "x" * 900_000}},
        {"entities": [{"id": 1}], "features": {"x" * 900_000: 1}},
        {"entities": [{"id": [1] * 900_000}]},
    ):
        with pytest.raises(InvalidRequest) as refused:
            parse_predict(body, INPUTS, now=NOW)
        assert len(json.loads(refusal(refused.value).body)["error"]) <= MAX_MESSAGE + 1


def test_request_goes_to_another_replica_when_the_key_store_is_down() -> None:
    """The other one may have the keys. The client gets 503 if none has, without details of the installation."""
    answer = refusal(KeyStoreUnavailable("No key broker answers at /run/falaj"))
    assert (answer.status_code, answer.headers["retry-after"]) == (TRY_ANOTHER, "1")
    assert json.loads(answer.body) == {"error": "The key store cannot be used now.", "code": 503}


def test_wrong_outcome_is_refused_by_position() -> None:
    """One wrong outcome refuses the whole request."""
    good = {"prediction_id": "abc", "outcome": 1}
    model, records = parse_outcomes({"model": "m", "outcomes": [good]}, received_at=NOW)
    assert (model, records[0].outcome, records[0].row) == ("m", 1, 0)
    for bad in (
        {"outcome": 1},
        {**good, "row": -1},
        {**good, "row": 2**63},
        {**good, "outcome": None},
        {**good, "observed_at": "x"},
        {**good, "observed_at": "9999-12-31T23:59:59-10:00"},
        {**good, "a": 1},
    ):
        with pytest.raises(InvalidRequest, match=r"outcomes\[1\]"):
            parse_outcomes({"model": "m", "outcomes": [good, bad]}, received_at=NOW)


def test_accepted_outcomes_can_be_read_again(tmp_path: Path) -> None:
    """For every zone and value: an accepted outcome must never make the log unreadable."""
    moments = ["2016-01-01", "2016-01-01T00:00:00+05:30:15", "0001-01-01T00:00:00", "2016-01-01T00:00:00.5Z"]
    values: list[Any] = [1, "yes", 1.5, True]
    items = [
        {"prediction_id": str(i), "outcome": value, "observed_at": moment}
        for i, (value, moment) in enumerate(zip(values, moments, strict=True))
    ]
    _, records = parse_outcomes({"model": "m", "outcomes": items}, received_at=NOW)
    keyring = Keyring.create(tmp_path / "keyring.json", bytes(32))
    keyring.ensure(KeyInfo(name="outcomes/m/sensitive"))
    log = tmp_path / "outcomes" / "m"
    SegmentWriter(log, store=keyring, key="outcomes/m/sensitive").append(*records)
    read = read_outcomes(log, keyring)
    assert read.height == 4
    assert read["observed_at"].to_list()[1] == dt.datetime(2015, 12, 31, 18, 29, 45, tzinfo=dt.UTC)


EMB = InputSpec(name="p__emb", dtype="float", length=2)
IDS = InputSpec(name="p__ids", dtype="int16", length=2)
DUE = FieldSpec(name="due", dtype="date", sensitivity="internal", categorical=False)
QUERY = FieldSpec(name="query", dtype="list<string>", sensitivity="internal", categorical=False)
TYPED_INPUTS = {spec.name: spec for spec in (EMB, IDS, DUE, QUERY)}


@pytest.mark.parametrize(
    ("name", "sent", "values"),
    [
        ("p__emb", [0.5, 1], [[0.5, 1]] * 2),
        ("p__emb", [[0.5, 1], None], [[0.5, 1], None]),
        ("p__ids", [3.0, 2], [[3, 2]] * 2),
        ("due", "2026-01-31", ["2026-01-31"] * 2),
        ("due", ["2026-01-31", None], ["2026-01-31", None]),
        ("query", [], [[], []]),
        ("query", [["a"], []], [["a"], []]),
    ],
)
def test_override_is_one_value_or_one_for_each_entity(name: str, sent: Any, values: list[Any]) -> None:
    """For an input of lists, a list of lists has one value for each entity."""
    body = {"entities": [{"id": 1}, {"id": 2}], "features": {name: sent}}
    assert parse_predict(body, TYPED_INPUTS, now=NOW).overrides == {name: values}


LIST = "'p__emb' must be a list of 2 numbers"


@pytest.mark.parametrize(
    ("name", "sent", "message"),
    [
        ("p__age", "old", "p__age.*a number"),
        ("p__age", [1, 2], "2 values for 1"),
        ("p__age", {"a": 1}, "single value"),
        ("p__age", float("nan"), "finite"),
        ("p__age", True, "p__age.*a number"),
        ("p__ag", 1, "Did you mean 'p__age'"),
        ("p__sex", 1, "p__sex.*text"),
        ("p__count", 50.5, r"p__count.*a whole number \(int64\), got 50.5"),
        ("p__count", True, "p__count.*a whole number"),
        ("p__count", 2**63, "p__count.*from -9223372036854775807 to"),
        ("p__count", 1e300, "p__count.*a whole number"),
        ("p__tiny", 300, "p__tiny.*from -128 to 127"),
        ("p__tiny", 1.5, "p__tiny.*a whole number"),
        ("p__flag", 1, "p__flag.*true or false"),
        *(("p__emb", sent, LIST) for sent in (0.5, [0.5], ["a", "b"], [[0.5, True]], [[0.5, None]])),
        ("p__ids", [[1, 1.5]], r"'p__ids' must be a list of 2 numbers \(int16\) or null, got 1.5"),
        ("p__ids", [[1, 40_000]], "'p__ids' must be a list of 2 numbers .* got 40000"),
        ("due", 20484, "'due' must be date"),
        ("due", "tomorrow", "'due' must be date"),
        ("query", [["a", 1]], r"'query' must be list<string>: an element is not a valid string"),
    ],
)
def test_wrong_feature_is_refused_by_name(name: str, sent: Any, message: str) -> None:
    """The message has the expected type."""
    body = {"entities": [{"id": 1}], "features": {name: sent}}
    with pytest.raises(InvalidRequest, match=message):
        parse_predict(body, INPUTS | TYPED_INPUTS, now=NOW)
