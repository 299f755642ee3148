"""Tests of the inference protocol through a real edge to a real replica, without Ray.

NVIDIA's client works unchanged. Requests that schemathesis generates from our OpenAPI document get documented
answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tritonclient.utils import InferenceServerException

from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.tokens.roles import Role
from tests.clients.stock_client import StockClient, wanted
from tests.servers.edge import Edge, running_edge
from tests.servers.replica import running_features, running_replica

SIGNATURE = ModelSignature(
    task=Task.multiclass,
    inputs=(
        InputSpec(name="p__age", dtype="double"),
        InputSpec(name="p__sex", dtype="string", categories=("f", "m")),
        InputSpec(name="p__flag", dtype="bool"),
    ),
    label="y",
    classes=("a", "b", "é"),
)
NOT_HERE = ("/v1/jobs", "/v1/rollouts")
COLUMNS = {
    "p__age": np.array([3.5, -2.0]),
    "p__sex": np.array(["m", "f"], dtype=np.object_),
    "p__flag": np.array([True, False]),
}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """Run an edge with version 1 of model `m`, and the applications for outcomes and features."""
    with (
        running_edge(tmp_path_factory.mktemp("edge")) as edge,
        running_replica(Path(edge.places.root), SIGNATURE) as replica,
        running_features(replica) as features,
    ):
        targets = {"m-v1": replica.address, "outcomes": replica.outcomes, "features": features}
        edge.load_targets({name: (address,) for name, address in targets.items()})
        yield edge


@pytest.fixture
def client(edge: Edge) -> Iterator[StockClient]:
    client = StockClient(f"127.0.0.1:{edge.port}", edge.ca_file, edge.token())
    yield client
    client.close()


def test_it_finds_out_what_is_served(client: StockClient) -> None:
    """The client reads liveness, readiness and metadata of the server and of a version."""
    triton, headers = client.client, client.headers
    assert triton.is_server_live(headers=headers)
    assert triton.is_server_ready(headers=headers)
    ready = [triton.is_model_ready("m", version, headers=headers) for version in ("", "1", "2")]
    assert ready == [True, True, False]
    assert not triton.is_model_ready("unknown", headers=headers)
    server = triton.get_server_metadata(headers=headers)
    assert (server["name"], "binary_tensor_data" in server["extensions"]) == ("falaj", True)
    described = triton.get_model_metadata("m", "1", headers=headers)
    assert {one["name"]: one["datatype"] for one in described["inputs"]} == {
        "p__age": "FP64",
        "p__sex": "BYTES",
        "p__flag": "BOOL",
    }


@pytest.mark.parametrize("raw", [False, True], ids=["json", "binary"])
def test_it_gets_its_answers(client: StockClient, raw: bool) -> None:
    """The client gets answers as JSON and as binary data.

    It gets all outputs or only the requested ones, and its own request id.
    """
    whole = client.infer("m", COLUMNS, raw=raw, version="1", request_id="mine")
    assert whole.get_response()["id"] == "mine"
    probabilities = whole.as_numpy("probabilities")
    assert probabilities.shape == (2, 3)
    assert probabilities.sum(axis=1) == pytest.approx([1, 1])
    labels = [SIGNATURE.classes[n] for n in probabilities.argmax(axis=1)] if SIGNATURE.classes else []
    outputs = [wanted("label", raw=raw), wanted("probabilities", raw=not raw)]
    part = client.infer("m", COLUMNS, raw=raw, outputs=outputs)
    assert [one["name"] for one in part.get_response()["outputs"]] == ["label", "probabilities"]
    found = [one.decode() if isinstance(one, bytes) else one for one in part.as_numpy("label")]
    assert found == labels
    assert np.array_equal(part.as_numpy("probabilities"), probabilities)


def test_it_says_what_was_wrong(client: StockClient) -> None:
    """The client's exception has our error message and the status."""
    with pytest.raises(InferenceServerException, match="'p__flag' is missing") as refused:
        client.infer("m", {name: COLUMNS[name] for name in ("p__age", "p__sex")}, raw=True)
    assert refused.value.status() == "400"
    client.token = "none"
    with pytest.raises(InferenceServerException) as refused:
        client.infer("m", COLUMNS, raw=True)
    assert refused.value.status() == "401"


def test_what_the_openapi_document_says_is_true(edge: Edge) -> None:
    """For every operation, valid and invalid requests get documented answers, and the server does not fail."""
    token = edge.token(Role.admin)
    response = requests.get(f"{edge.url}/openapi.json", headers=bearer(token), verify=edge.ca_file, timeout=5)
    schema = schemathesis.openapi.from_dict(of_this_model(response.json()))
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 14
    session, answered = requests.Session(), set()
    for operation in operations:
        takes_something = {"parameters", "requestBody"} & operation.definition.raw.keys()
        for mode in GenerationMode if takes_something else (GenerationMode.POSITIVE,):
            fuzz(operation.as_strategy(generation_mode=mode), edge, session, bearer(token), answered)
    assert answered == {operation.label for operation in operations}


def of_this_model(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with the names of the served model, service and view.

    Without these names, almost every request would be rejected as unknown. Paths of jobs and rollouts are left out,
    because no service for them runs here.
    """
    document["paths"] = {
        path: operations for path, operations in document["paths"].items() if not path.startswith(NOT_HERE)
    }
    components = document["components"]
    components["parameters"]["model"]["schema"] = {"enum": ["m"]}
    components["parameters"]["version"]["schema"] = {"enum": ["1"]}
    values = {
        "p__age": {"type": "number", "maximum": 3.4028234663852886e38},
        "p__sex": {"type": "string"},
        "p__flag": {"type": "boolean"},
    }
    kinds = {"p__age": "FP64", "p__sex": "BYTES", "p__flag": "BOOL"}
    tensors = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "datatype": {"const": kinds[name]},
                "shape": {"const": [1]},
                "data": {"type": "array", "items": value, "minItems": 1, "maxItems": 1},
            },
            "required": ["name", "datatype", "shape", "data"],
            "additionalProperties": False,
        }
        for name, value in values.items()
    ]
    infer = components["schemas"]["Infer"]["properties"]
    infer["inputs"] = {"type": "array", "prefixItems": tensors, "items": False, "minItems": 3}
    infer["outputs"]["items"]["properties"]["name"] = {"enum": ["label", "probabilities"]}
    components["schemas"]["Infer"]["additionalProperties"] = False
    predict = components["schemas"]["Predict"]
    predict["properties"]["features"] = {
        "type": "object",
        "properties": values,
        "required": list(values),
        "additionalProperties": False,
    }
    predict["properties"]["as_of"] = {"type": "string", "format": "date-time"}
    predict["required"] = ["entities", "features"]
    components["schemas"]["Read"]["properties"]["service"] = {"enum": ["credit"]}
    components["schemas"]["Entities"]["items"] = of_person = {
        "type": "object",
        "properties": {"person_id": {"type": "integer", "minimum": -(2**63) + 1, "maximum": 2**63 - 1}},
        "required": ["person_id"],
        "additionalProperties": False,
    }
    push = components["schemas"]["Push"]["properties"]
    push["view"] = {"enum": ["income"]}
    push["rows"]["items"]["properties"] |= {
        "keys": of_person,
        "features": {
            "type": "object",
            "properties": {"amount": {}, "sector": {}},
            "additionalProperties": False,
        },
    }
    outcomes = components["schemas"]["Outcomes"]["properties"]
    outcomes["model"] = {"enum": ["m"]}
    outcomes["outcomes"]["items"]["properties"]["outcome"] = {"enum": list(SIGNATURE.classes or ())}
    return document


def fuzz(
    cases: st.SearchStrategy[schemathesis.Case],
    edge: Edge,
    session: requests.Session,
    headers: dict[str, str],
    answered: set[str],
) -> None:
    # Each model has its own input names, so a request that fits the document may not fit the model.
    too_strict = [positive_data_acceptance]

    @given(cases)
    @settings(
        suppress_health_check=list(HealthCheck),
        deadline=None,
        derandomize=True,
        max_examples=settings.default.max_examples // 3,
    )
    def check(case: schemathesis.Case) -> None:
        response = case.call_and_validate(
            base_url=edge.url,
            session=session,
            headers=headers,
            excluded_checks=too_strict,
            verify=edge.ca_file,
            timeout=10,
        )
        if response.status_code == 200:
            answered.add(case.operation.label)

    check()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
