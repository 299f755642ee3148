"""A real replica for a model of each task: both endpoints, every operation of the protocol, and the log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cluster.runtime import InputSpec
from cluster.security.tokens.roles import Role
from serve_apps.predictor.tensors import to_raw
from tests.samples.signatures import of_each_task
from tests.servers.replica import Replica, running_replica

AGE = InputSpec(name="p__age", dtype="double")
SEX = InputSpec(name="p__sex", dtype="string", categories=("f", "m"))
SIGNATURES = of_each_task(AGE, SEX, multiclass=(1, 2, 3))
AGES, SEXES = [3.5, None, -200.0], ["m", "f", None]
INFER, PREDICT = "/v2/models/m/infer", "/v1/models/m:predict"
INPUTS = [
    {"name": "p__sex", "datatype": "BYTES", "shape": [3], "data": SEXES},
    {"name": "p__age", "datatype": "FP32", "shape": [3, 1], "data": [[age] for age in AGES]},
]


@pytest.fixture(scope="module", params=SIGNATURES, ids=lambda signature: signature.task.value)
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with running_replica(tmp_path_factory.mktemp("replica"), request.param) as running:
        yield running


def rows(replica: Replica) -> list[dict[str, Any]]:
    body = {"entities": [{"id": n} for n in range(3)], "features": {"p__age": AGES, "p__sex": SEXES}}
    status, content = replica.json(PREDICT, body)
    assert status == 200
    return list(content["predictions"])


def tensors(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the answer of `:predict` as the protocol's outputs."""
    named = {name: [row[name] for row in rows] for name in rows[0]}
    if "probabilities" in named:
        named["probabilities"] = [p for row in named["probabilities"] for p in row.values()]
    return named


def test_both_endpoints_give_the_same_answer(replica: Replica) -> None:
    """null is a missing value in both; each answer is in the log under its id."""
    status, content = replica.json(INFER, {"id": "one", "inputs": INPUTS})
    outputs = {output["name"]: output["data"] for output in content["outputs"]}
    assert (status, content["id"], outputs) == (200, "one", tensors(rows(replica)))
    log = replica.log()
    logged = log.filter(log["prediction_id"] == content["parameters"]["prediction_id"])
    assert logged["p__age"].to_list() == AGES
    assert logged["p__sex"].to_list() == SEXES


def test_binary_data_gives_the_same_answer(replica: Replica) -> None:
    """Both request and answer contain binary data. Another input is JSON. The header has the length of the JSON."""
    raw = to_raw("FP64", [np.nan if age is None else age for age in AGES])
    size = {"binary_data_size": len(raw)}
    inputs = [INPUTS[0], {"name": "p__age", "datatype": "FP64", "shape": [3], "parameters": size}]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    status, headers, body = replica.call(
        INFER, head + raw, headers={"Inference-Header-Content-Length": str(len(head))}
    )
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    at = int(headers["inference-header-content-length"])
    expected = tensors(rows(replica))
    content = json.loads(body[:at])
    assert "id" not in content
    for output in content["outputs"]:
        size = output["parameters"]["binary_data_size"]
        assert body[at : at + size] == to_raw(output["datatype"], expected[output["name"]])
        at += size
    assert at == len(body)


def test_only_requested_outputs_are_sent(replica: Replica) -> None:
    """The log still has the whole answer."""
    name = replica.json("/v2/models/m")[1]["outputs"][0]["name"]
    status, content = replica.json(INFER, {"inputs": INPUTS, "outputs": [{"name": name}]})
    assert (status, [output["name"] for output in content["outputs"]]) == (200, [name])
    log = replica.log()
    logged = log.filter(log["prediction_id"] == content["parameters"]["prediction_id"])
    assert logged["value" if name == "value" else "label"].null_count() == 0


def test_path_may_name_only_this_replicas_version(replica: Replica) -> None:
    """For `infer`, metadata and readiness; another version is 404."""
    body = {"inputs": INPUTS}
    assert replica.json("/v2/models/m/versions/1/infer", body)[0] == 200
    assert replica.json("/v2/models/m/versions/1") == replica.json("/v2/models/m")
    assert replica.json("/v2/models/m/versions/1/ready") == (200, {"name": "m", "ready": True})
    for version in ("2", "01", "latest", "1%2F2"):
        status, content = replica.json(f"/v2/models/m/versions/{version}/infer", body)
        assert (status, content["code"]) == (404, 404)
    assert "with version 1, not with '2'" in replica.json("/v2/models/m/versions/2")[1]["error"]


def test_wrong_method_or_role_is_refused(replica: Replica) -> None:
    """405 names the method; an auditor may read metadata, but not predict."""
    status, headers, _ = replica.call(INFER, method="GET")
    assert (status, headers["allow"]) == (405, "POST")
    assert replica.call("/v2/models/m", b"{}")[0] == 405
    auditor = replica.token(Role.auditor)
    assert replica.json("/v2/models/m", token=auditor)[0] == 200
    assert replica.json(INFER, {"inputs": INPUTS}, token=auditor)[0] == 403
    assert replica.json(INFER, {"inputs": INPUTS}, token="a.b.c")[0] == 401
