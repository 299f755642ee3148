"""Tests of value types and of parsing outcomes. Requests and log readers use the same rules."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.runtime import InputSpec, ModelSignature, OutcomeParser, Task
from cluster.runtime.values import WrongValueType, value_type

LARGE = 2**53 + 1
INPUTS = (InputSpec(name="x", dtype="double"),)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("int64", [1, None, 50.0, LARGE], [1, None, 50, LARGE]),
        ("int64", [2**63 - 1, 1 - 2**63], [2**63 - 1, 1 - 2**63]),
        ("uint8", [0, 255], [0, 255]),
        ("double", [1, 1.5, None], [1, 1.5, None]),
        ("float32", [1e308, 1e308], [1e308, 1e308]),
        ("bool", [True, None], [True, None]),
        ("string", ["1", None], ["1", None]),
        ("int64", [], []),
    ],
)
def test_values_of_a_type_are_kept(dtype: str, values: list[Any], expected: list[Any]) -> None:
    """Whole floats become ints for an integer type. Large integers lose no digit next to a float."""
    kind = value_type(dtype)
    assert kind is not None
    result = list(kind.convert(values))
    assert (result, list(map(type, result))) == (expected, list(map(type, expected)))


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        *(("int64", value) for value in (1.5, True, "1", 2**63, -(2**63), 1e300, float("nan"), [1])),
        ("int8", 128),
        ("uint16", -1),
        *(("double", value) for value in (True, "1", float("inf"), 2**64, {})),
        *(("bool", value) for value in (1, "true")),
        *(("string", value) for value in (1, True)),
    ],
)
def test_value_of_another_type_is_refused_or_becomes_null(dtype: str, wrong: Any) -> None:
    """Other values of the same list are kept."""
    kind = value_type(dtype)
    assert kind is not None
    good: dict[str, Any] = {"bool": True, "string": "a", "double": 0.5}
    right = good.get(dtype, LARGE if dtype == "int64" else 7)
    for values in ([wrong], [right, wrong]):
        with pytest.raises(WrongValueType):
            kind.convert(values)
    assert kind.convert_or_null([right, wrong, None]) == ([right, None, None], 1)


def truths(*classes: Any) -> OutcomeParser:
    task = Task.binary if len(classes) == 2 else Task.multiclass
    signature = ModelSignature(task=task, inputs=INPUTS, label="y", classes=classes)
    return OutcomeParser(signature)


@pytest.mark.parametrize(
    ("classes", "meanings"),
    [
        ((0, 1), {1: [1, 1.0, True, "1"], 0: [0, 0.0, False, "0"], None: [2, 0.5, "true", "yes", [1]]}),
        ((False, True), {True: [True, 1, 1.0], False: [False, 0], None: ["true", "True", "1", 2]}),
        (("no", "yes"), {"yes": ["yes"], None: ["Yes", 1, True, ""]}),
        (("0", "1"), {"1": ["1", 1, 1.0], None: [True, "1.0", "01"]}),
        (("a", "b", "c"), {"c": ["c"], None: ["d", 2]}),
    ],
)
def test_outcome_is_parsed_as_a_class_or_none(
    classes: tuple[Any, ...], meanings: dict[Any, list[Any]]
) -> None:
    """JSON can write a class in several ways."""
    for expected, outcomes in meanings.items():
        for outcome in outcomes:
            result = truths(*classes).parse(outcome)
            assert (result, type(result)) == (expected, type(expected)), outcome


def test_regression_outcome_must_be_a_finite_number() -> None:
    """Text and booleans are invalid."""
    parser = OutcomeParser(ModelSignature(task=Task.regression, inputs=INPUTS, label="y"))
    assert [parser.parse(value) for value in (1, 1.5, -0.0)] == [1.0, 1.5, 0.0]
    assert {
        parser.parse(value) for value in ("1.5", "high", True, float("nan"), float("inf"), 10**400, None)
    } == {None}
