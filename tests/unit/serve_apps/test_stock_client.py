"""A stock client works unchanged: NVIDIA's, through a real edge to a real replica."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from cluster.runtime import InputSpec, ModelSignature, Task
from tests.edge import Edge
from tests.replica import Replica, running_replica
from tests.stock_client import StockClient, wanted

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
COLUMNS = {
    "p__age": np.array([3.5, -2.0]),
    "p__sex": np.array(["m", "f"], dtype=np.object_),
    "p__flag": np.array([True, False]),
}


@pytest.fixture(scope="module")
def replica(edge: Edge) -> Iterator[Replica]:
    """Version 1 of the edge's model."""
    with running_replica(Path(edge.places.root), SIGNATURE) as running:
        edge.load_targets(edge.targets | {"m-v1": (running.address,)})
        yield running
    assert running.failures == []


@pytest.fixture
def client(edge: Edge, replica: Replica) -> Iterator[StockClient]:
    client = StockClient(f"127.0.0.1:{edge.port}", f"{edge.places.tls}/ca.pem", edge.token())
    yield client
    client.close()


def test_it_finds_out_what_is_served(client: StockClient) -> None:
    """Liveness, readiness, of the server and of a version, and both metadata."""
    triton, headers = client.client, client.headers
    assert triton.is_server_live(headers=headers)
    assert triton.is_server_ready(headers=headers)
    ready = [triton.is_model_ready("m", version, headers=headers) for version in ("", "1", "2")]
    assert ready == [True, True, False]
    assert not triton.is_model_ready("unknown", headers=headers)
    assert "binary_tensor_data" in triton.get_server_metadata(headers=headers)["extensions"]
    described = triton.get_model_metadata("m", "1", headers=headers)
    assert {one["name"]: one["datatype"] for one in described["inputs"]} == {
        "p__age": "FP64",
        "p__sex": "BYTES",
        "p__flag": "BOOL",
    }


@pytest.mark.parametrize("raw", [False, True], ids=["json", "binary"])
def test_it_gets_its_answers(client: StockClient, raw: bool) -> None:
    """As JSON and as binary data, all outputs or those asked for, with its own id."""
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
    """Its exception carries our words and the status."""
    with pytest.raises(InferenceServerException, match="'p__flag' is missing") as refused:
        client.infer("m", {name: COLUMNS[name] for name in ("p__age", "p__sex")}, raw=True)
    assert refused.value.status() == "400"
    client.token = "none"
    with pytest.raises(InferenceServerException) as refused:
        client.infer("m", COLUMNS, raw=True)
    assert refused.value.status() == "401"
