"""Tensors of the Open Inference Protocol: what is accepted, what is refused, and what an answer contains."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.runtime import InputSpec, ModelSignature, Task
from serve_apps.predictor.inference_protocol import (
    Inference,
    encode_answer,
    metadata,
    output_names,
    output_tensors,
    parse_infer,
    split_body,
)
from serve_apps.predictor.tensors import DATATYPES, RawData, to_raw
from tests.samples.signatures import of_each_task

AGE = InputSpec(name="p__age", dtype="double")
SEX = InputSpec(name="p__sex", dtype="string", categories=("1", "2"))
FLAG = InputSpec(name="p__flag", dtype="bool")
INPUTS = {spec.name: spec for spec in (AGE, SEX)}
OUTPUTS = ("probability", "label")


def tensor(name: str, data: Any, datatype: str = "FP64", shape: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": data, **more}


def raw_tensor(name: str, size: Any, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


def parse(
    *tensors: Any, inputs: dict[str, InputSpec] = INPUTS, raw: bytes | None = None, **more: Any
) -> Inference:
    data = RawData(None if raw is None else memoryview(raw))
    return parse_infer({"inputs": list(tensors), **more}, inputs, OUTPUTS, data)


def column(given: dict[str, Any], spec: InputSpec, raw: bytes | None = None) -> list[Any]:
    return parse(given, inputs={spec.name: spec}, raw=raw).columns[spec.name]


SEXES = tensor("p__sex", ["1"], "BYTES")


def test_named_tensors_are_columns() -> None:
    """Their order does not matter. The data is nested by the shape or flat, and null is a missing value."""
    age, sex = tensor("p__age", [1.5, None]), tensor("p__sex", [["1"], [None]], "BYTES", [2, 1])
    request = parse(sex, age, id="a", parameters={"unknown": 1})
    assert request.columns == {"p__age": [1.5, None], "p__sex": ["1", None]}
    assert (request.id, request.count, [output.name for output in request.outputs]) == ("a", 2, list(OUTPUTS))
    assert column(tensor("p__age", [1.0, 2.0], shape=[2, 1]), AGE) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "inputs"),
        ([tensor("p__age", [1.0])], "'p__sex' is missing"),
        ([tensor("p__age", [1.0], shape=[2])], r"shape \[2\] and 1 values"),
        ([tensor("p__age", [1.0], shape=[1, 2])], r"shape \[1, 2\] and 1 values"),
        ([tensor("p__age", [1.0, 2.0], shape=[1, 2])], r"2 values a row; give shape \[n\] or \[n, 1\]"),
        ([tensor("p__age", [1.0], shape=[1, 0])], r"\[n\], \[n, 1\]"),
        ([tensor("p__age", [1.0], shape=[True])], r"\[n\], \[n, 1\]"),
        ([tensor("p__age", [1.0], shape=[1.0])], r"\[n\], \[n, 1\]"),
        ([tensor("p__age", [1.0], shape=[-1])], "1 to 1000 rows"),
        ([tensor("p__age", [1.0], shape=[2**70])], "1 to 1000 rows"),
        ([tensor("p__age", [], shape=[0])], "1 to 1000 rows"),
        ([tensor("p__age", [1.0] * 1001)], "1 to 1000 rows"),
        ([tensor("p__age", [1.0], shape="1")], "shape '1'"),
        ([tensor("p__age", [[1.0]])], "cannot hold"),
        ([tensor("p__age", [[1.0, 2.0], [3.0]], shape=[2, 1])], "cannot hold"),
        ([tensor("p__age", [[[1.0]]], shape=[1, 1])], "cannot hold"),
        ([tensor("p__age", {"a": 1.0}, shape=[1])], "data as a list"),
        ([tensor("p__age", [1.0], "FP99")], "unknown datatype 'FP99'"),
        ([tensor("p__age", [1.0], "fp64")], "unknown datatype"),
        ([tensor("p__age", [1.0]) | {"datatype": ["FP64"]}], "unknown datatype"),
        ([tensor("p__age", [1.0]), tensor("p__age", [1.0])], "twice"),
        ([tensor("p__age", [1.0, 2.0]), SEXES], "1 values for 2"),
        ([tensor("p__ag", [1.0]), SEXES], "Did you mean 'p__age'"),
        ([tensor("p__age", ["x"]), SEXES], "FP64, which cannot hold 'x'"),
        ([tensor("p__age", [True]), SEXES], "FP64, which cannot hold True"),
        ([tensor("p__age", [1.5], "INT64"), SEXES], "INT64, which cannot hold 1.5"),
        ([tensor("p__age", [256], "UINT8"), SEXES], "from 0 to 255"),
        ([tensor("p__age", [-1], "UINT64"), SEXES], "from 0 to"),
        ([tensor("p__age", [2**63], "UINT64"), SEXES], "from 0 to"),
        ([tensor("p__age", ["1"], "BYTES"), SEXES], r"a number \(FP64\), got BYTES"),
        ([tensor("p__age", [True], "BOOL"), SEXES], r"a number \(FP64\), got BOOL"),
        ([tensor("p__sex", [1.0])], r"text \(BYTES\), got FP64"),
        ([{"name": "p__age"}], "datatype"),
        ([tensor("p__age", [65_505.0], "FP16")], "FP16, from -65504.0 to 65504.0 here, got 65505.0"),
        ([tensor("p__age", [-70_000], "FP16")], "FP16"),
        ([tensor("p__age", [3.5e38], "FP32")], "FP32"),
        ([tensor("p__age", [10**309])], "FP64"),
        (["p__age"], "object"),
        ([{"name": ["p__age"]}], "object"),
        ([tensor("p__age", [1.0], parameters=[])], "parameters must be an object"),
        ([tensor("p__age", [1.0], parameters={"shared_memory_region": "r"})], "not supported"),
        ([tensor("p__age", [1.0], parameters={"binary_data_size": 8})], "both data and"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tensors: list[Any], message: str) -> None:
    """Wrong shape, nesting, datatype, count, value or parameter."""
    with pytest.raises(InvalidRequest, match=message):
        parse(*tensors, raw=b"")


def test_tensor_of_another_number_type_is_converted() -> None:
    """Clients send FP64 for all numbers: 50.0 is the integer 50, and 1.5 is not an integer."""
    count = InputSpec(name="p__count", dtype="int64")
    assert column(tensor("p__count", [50.0, None], "FP64"), count) == [50, None]
    small = InputSpec(name="p__count", dtype="int8")
    assert column(tensor("p__count", [127], "INT64"), small) == [127]
    for spec, wrong in ((count, 1.5), (count, 2.0**60), (small, 128.0)):
        with pytest.raises(InvalidRequest, match=r"p__count.*a whole number"):
            column(tensor("p__count", [1.0, wrong], "FP64"), spec)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"id": 5}, '"id" must be text'),
        ({"parameters": 5}, "parameters must be an object"),
        ({"parameters": {"binary_data_output": 1}}, "binary_data_output must be true or false"),
        ({"outputs": {}}, '"outputs" must be a list'),
        ({"outputs": ["label"]}, "an object with a name"),
        ({"outputs": [{"name": ["label"]}]}, "an object with a name"),
        ({"outputs": [{"name": "lable"}]}, "Did you mean 'label'"),
        ({"outputs": [{"name": "label"}, {"name": "label"}]}, "requested twice"),
        ({"outputs": [{"name": "label", "parameters": {"binary_data": "yes"}}]}, "binary_data must be"),
        ({"outputs": [{"name": "label", "parameters": {"classification": 2}}]}, "not supported"),
    ],
)
def test_id_parameters_and_outputs_are_validated(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(tensor("p__age", [1.0]), SEXES, **more)


def test_outputs_are_encoded_as_requested() -> None:
    """A subset, in the requested order, each as JSON or binary data; an output's own flag overrides the request's."""
    age = tensor("p__age", [1.0])
    both = [{"name": "label"}, {"name": "probability", "parameters": {"binary_data": False}}]
    request = parse(age, SEXES, outputs=both, parameters={"binary_data_output": True})
    assert [(output.name, output.raw) for output in request.outputs] == [
        ("label", True),
        ("probability", False),
    ]
    assert [output.name for output in parse(age, SEXES, outputs=[{"name": "label"}]).outputs] == ["label"]
    assert [one.raw for one in parse(age, SEXES, outputs=[]).outputs] == [False, False]


FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    "BYTES": st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    "FP16": st.floats(width=16, allow_nan=False, allow_infinity=False),
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": FINITE,
} | {name: st.integers(*one.limits) for name, one in DATATYPES.items() if one.limits is not None}
SPECS = {"BOOL": FLAG, "BYTES": SEX}


@given(
    st.sampled_from(sorted(VALUES)).flatmap(
        lambda name: st.tuples(st.just(name), st.lists(VALUES[name], min_size=1))
    )
)
def test_binary_data_is_the_same_column_as_json(drawn: tuple[str, list[Any]]) -> None:
    """For every datatype, value by value."""
    datatype, values = drawn
    spec = SPECS.get(datatype, AGE)
    raw = to_raw(datatype, values)
    given_raw = raw_tensor(spec.name, len(raw), datatype, [len(values)])
    assert column(given_raw, spec, raw) == column(tensor(spec.name, values, datatype), spec) == values


def test_nan_in_binary_data_is_missing() -> None:
    """This is the same as in numpy. An infinity is refused."""
    raw = np.array([1.0, np.nan], dtype="<f4").tobytes()
    assert column(raw_tensor("p__age", 8, "FP32", [2]), AGE, raw) == [1.0, None]
    for bad in (np.inf, -np.inf):
        with pytest.raises(InvalidRequest, match="finite"):
            column(raw_tensor("p__age", 8, "FP64", [1]), AGE, struct.pack("<d", bad))


@pytest.mark.parametrize(
    ("spec", "given", "raw", "message"),
    [
        (AGE, raw_tensor("p__age", 8, "FP64", [1]), None, "no Inference-Header-Content-Length"),
        (AGE, raw_tensor("p__age", 8, "FP64", [1]), b"1234567", "7 bytes are left"),
        (AGE, raw_tensor("p__age", 8, "FP64", [1]), b"123456789", "1 bytes of binary data belong to no"),
        (AGE, raw_tensor("p__age", 7, "FP64", [1]), b"1234567", "7 bytes for 1 values"),
        (AGE, raw_tensor("p__age", 8, "FP64", [2]), b"12345678", "8 bytes for 2 values"),
        (AGE, raw_tensor("p__age", 0, "FP64", [1]), b"", "0 bytes for 1 values"),
        (AGE, raw_tensor("p__age", -8, "FP64", [1]), b"12345678", "-8"),
        (AGE, raw_tensor("p__age", 2**64, "FP64", [1]), b"12345678", str(2**64)),
        (AGE, raw_tensor("p__age", 8.0, "FP64", [1]), b"12345678", r"8\.0"),
        (AGE, raw_tensor("p__age", True, "UINT8", [1]), b"1", "True"),
        (AGE, raw_tensor("p__age", "8", "FP64", [1]), b"12345678", "'8'"),
        (AGE, raw_tensor("p__age", None, "FP64", [1]), b"12345678", "None"),
        (AGE, raw_tensor("p__age", 8, "UINT64", [1]), b"\xff" * 8, "from 0 to"),
        (AGE, tensor("p__age", [1.0]), b"1", "belong to no"),
        (FLAG, raw_tensor("p__flag", 2, "BOOL", [2]), b"\x01\x02", "a byte 0 or 1"),
        (SEX, raw_tensor("p__sex", 5, "BYTES", [2]), b"\x01\x00\x00\x001", "within its item 1 of 2"),
        (SEX, raw_tensor("p__sex", 3, "BYTES", [1]), b"\x01\x00\x00", "within its item 0 of 1"),
        (SEX, raw_tensor("p__sex", 5, "BYTES", [1]), b"\xff\xff\xff\xff1", "within its item 0 of 1"),
        (SEX, raw_tensor("p__sex", 6, "BYTES", [1]), b"\x01\x00\x00\x0012", "1 bytes behind its 1 items"),
        (SEX, raw_tensor("p__sex", 5, "BYTES", [1]), b"\x01\x00\x00\x00\xff", "not UTF-8"),
    ],
)
def test_binary_data_of_a_wrong_size_is_refused(
    spec: InputSpec, given: dict[str, Any], raw: bytes | None, message: str
) -> None:
    """Too much, too little, without a size, or not at the boundary of an item."""
    with pytest.raises(InvalidRequest, match=message):
        column(given, spec, raw)


@pytest.mark.parametrize(
    "length", [["-1"], ["+2"], ["1_0"], [""], ["two"], ["٢"], ["9" * 5000], ["3"], ["2", "2"], ["0"], ["1"]]
)
def test_wrong_length_of_the_json_is_refused(length: list[str]) -> None:
    """The length is not a number, is larger than the body, is repeated, or is not where the JSON ends."""
    with pytest.raises(InvalidRequest):
        split_body(b"{}", length)
    assert split_body(b"{}", ["2"])[0] == {}


BINARY, ABC, VALUE = of_each_task(AGE, SEX, binary=(0, 1), multiclass=("a", "b", "é"))
ROWS: list[tuple[ModelSignature, dict[str, Any], dict[str, Any]]] = [
    (BINARY, {"probability": 0.7, "label": 1}, {"probability": [0.7], "label": [1]}),
    (
        ABC,
        {"probabilities": {"a": 0.1, "b": 0.2, "é": 0.7}, "label": "é"},
        {"probabilities": [0.1, 0.2, 0.7], "label": ["é"]},
    ),
    (VALUE, {"value": 3.5}, {"value": [3.5]}),
]


@pytest.mark.parametrize(("signature", "row", "expected"), ROWS)
def test_each_task_has_its_outputs(
    signature: ModelSignature, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    """The metadata names exactly what an answer contains, and JSON and binary data are equal."""
    assert output_names(signature) == tuple(expected)
    described = {one["name"]: one for one in metadata("m", 1, signature)["outputs"]}
    outputs = output_tensors(signature, [row])
    for raw in (False, True):
        request = parse(tensor("p__age", [1.0]), SEXES)
        requested = parse_infer(
            {"inputs": [tensor("p__age", [1.0]), SEXES], "parameters": {"binary_data_output": raw}},
            INPUTS,
            output_names(signature),
            RawData(),
        ).outputs
        body, length = encode_answer({"id": request.id}, outputs, requested)
        assert (length is not None) == raw
        content = json.loads(body[:length])
        at = 0 if length is None else length
        for one in content["outputs"]:
            assert one["datatype"] == described[one["name"]]["datatype"]
            assert len(one["shape"]) == len(described[one["name"]]["shape"])
            size = one.get("parameters", {}).get("binary_data_size", 0)
            values = read_raw(one["datatype"], body[at : at + size]) if raw else one["data"]
            assert values == expected[one["name"]]
            at += size
        assert at == (len(body) if raw else 0)


def read_raw(datatype: str, data: bytes) -> list[Any]:
    """Decode one tensor's binary data, independently of the code under test."""
    if datatype != "BYTES":
        return list(struct.unpack(f"<{len(data) // 8}{'q' if datatype == 'INT64' else 'd'}", data))
    (size,) = struct.unpack("<I", data[:4])
    return [data[4 : 4 + size].decode()]


def test_list_input_is_one_tensor() -> None:
    """Nested, flat or raw; a row of only nulls is a missing list, and the metadata has the shape."""
    emb = InputSpec(name="p__emb", dtype="float", length=3)
    rows = [[0.5, 1.0, 2.0], None]
    flat = [0.5, 1.0, 2.0, None, None, None]
    raw = np.array(flat, dtype="<f4").tobytes()
    for sent, data in (
        (tensor("p__emb", [rows[0], [None] * 3], "FP32", [2, 3]), None),
        (tensor("p__emb", flat, "FP32", [2, 3]), None),
        (raw_tensor("p__emb", len(raw), "FP32", [2, 3]), raw),
    ):
        assert column(sent, emb, data) == rows
    assert column(
        tensor("p__emb", [7.0], shape=[1, 1]), InputSpec(name="p__emb", dtype="float", length=1)
    ) == [[7.0]]
    for data, shape, message in (
        ([1.0, 2.0], [1, 2], r"2 values a row; give shape \[n, 3\]"),
        ([1.0], [1], r"give shape \[n, 3\]"),
        ([1.0, None, 2.0], [1, 3], "some nulls"),
        ([[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]], [2, 3], "2 values"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            column(tensor("p__emb", data, "FP32", shape), emb)
    signature = ModelSignature(task=Task.regression, inputs=(AGE, emb), label="y")
    inputs = metadata("m", 1, signature)["inputs"]
    assert [(one["datatype"], one["shape"]) for one in inputs] == [("FP64", [-1]), ("FP32", [-1, 3])]


@pytest.mark.parametrize("length", [1, 2])
def test_list_of_integers_takes_no_other_numbers(length: int) -> None:
    """For every datatype of its tensor."""
    ids = InputSpec(name="p__ids", dtype="int64", length=length)
    whole = tensor("p__ids", [3.0] * length, shape=[1, length])
    assert column(whole, ids) == [[3] * length]
    with pytest.raises(InvalidRequest, match=r"list of . numbers \(int64\) or null, got 1.5"):
        column(tensor("p__ids", [1.5] * length, shape=[1, length]), ids)
