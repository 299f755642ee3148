"""A real replica for each task of what is no float32 graph: both endpoints answer, and as the registered files do.

`test_tasks` does the same for a float32 graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.runtime import InputSpec, ModelSignature, Precision, open_model
from tests.samples.network import write_network
from tests.samples.signatures import of_each_task
from tests.samples.trees import write_trees
from tests.servers.replica import Replica, running_replica

AGE = InputSpec(name="p__age", dtype="double")
SEX = InputSpec(name="p__sex", dtype="string", categories=("f", "m"))
SIGNATURES = of_each_task(AGE, SEX, multiclass=(1, 2, 3))
COLUMNS: dict[str, list[Any]] = {"p__age": [3.5, None, 80.0, 1e30], "p__sex": ["m", "f", None, "x"]}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An engine family."""

    name: str
    write: Callable[[Path, ModelSignature], None]
    precision: Precision = Precision.float32


KINDS = (
    Kind(name="lightgbm", write=write_trees),
    Kind(name="int8 network", write=write_network, precision=Precision.int8),
)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A running replica, and its model's files from before their registration."""

    replica: Replica
    folder: Path
    signature: ModelSignature


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture(scope="module", params=SIGNATURES, ids=lambda one: one.task.value)
def served(
    request: pytest.FixtureRequest, kind: Kind, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedModel]:
    root: Path = tmp_path_factory.mktemp("replica")
    signature = replace(request.param, precision=kind.precision)
    with running_replica(root, signature, write=kind.write) as replica:
        yield ServedModel(replica=replica, folder=root / "new", signature=signature)


def test_both_endpoints_answer_as_the_registered_files_do(served: ServedModel) -> None:
    """This includes a missing value, an unknown category and an extreme number."""
    count = len(COLUMNS["p__age"])
    expected = open_model(served.folder).predict(COLUMNS).rows()
    body = {"entities": [{"id": n} for n in range(count)], "features": COLUMNS}
    status, by_key = served.replica.json("/v1/models/m:predict", body)
    assert (status, by_key["predictions"]) == (200, expected)
    kinds = {"p__age": "FP64", "p__sex": "BYTES"}
    inputs = [
        {"name": name, "datatype": kinds[name], "shape": [count], "data": values}
        for name, values in COLUMNS.items()
    ]
    status, by_tensors = served.replica.json("/v2/models/m/infer", {"inputs": inputs})
    assert status == 200, by_tensors
    outputs = {one["name"]: one for one in by_tensors["outputs"]}
    for name in expected[0]:
        values = [row[name] for row in expected]
        if name == "probabilities":
            values = [score for scores in values for score in scores.values()]
            assert outputs[name]["shape"] == [count, 3]
        assert outputs[name]["data"] == values
    log = served.replica.log()
    assert log["prediction_id"].n_unique() == 2
    assert np.isfinite(open_model(served.folder).predict(COLUMNS).scores).all()
    assert served.replica.json("/v2/models/m")[1]["task"] == served.signature.task.value
