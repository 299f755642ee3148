"""Tests of one model for each task.

The job trains it, and clients call it through the edge at both endpoints.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.clients.stock_client import StockClient
from tests.integration.client import Client

if TYPE_CHECKING:
    from tests.integration.conftest import Project

ROWS = 1200
TREES = ("model=lightgbm", "model.rounds=20", "model.num_threads=1")
NETWORK = (
    "model=tabular_network",
    "model.width=16",
    "model.epochs=8",
    "model.batch_size=128",
    "scaling.num_workers=1",
)
AGES, CODES = [20.0, 70.0, None], ["c0", "c2", "c1"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model to train, and what its answers contain."""

    task: str
    label: str
    model: tuple[str, ...]
    row: set[str]
    """Fields of an entity's prediction from `:predict`."""
    outputs: set[str]
    """Names of the outputs of `infer`."""
    quality: str
    """Metric that must be above 0.6. Guessing does not reach this value."""

    @property
    def name(self) -> str:
        return f"of_{self.task}"


CASES = (
    Case(
        task="binary",
        label="old",
        model=TREES,
        row={"probability", "label"},
        outputs={"probability", "label"},
        quality="auc",
    ),
    Case(
        task="multiclass",
        label="group",
        model=(*NETWORK, "model.precision=int8"),
        row={"probabilities", "label"},
        outputs={"probabilities", "label"},
        quality="accuracy",
    ),
    Case(task="regression", label="income", model=NETWORK, row={"value"}, outputs={"value"}, quality="r2"),
)


@pytest.fixture(scope="module")
def project(falaj_cluster: Project) -> Project:
    """Return the cluster's project with rows to train all three models."""
    draw = np.random.default_rng(0)
    age, code = draw.uniform(0, 90, ROWS), draw.integers(0, 3, ROWS)
    income = 10 * age + 300 * code + draw.normal(0, 20, ROWS)
    table = pa.table(
        {
            "row": np.arange(ROWS),
            "age": age,
            "code": [f"c{n}" for n in code],
            "old": (age + draw.normal(0, 10, ROWS) > 45).astype(np.int64),
            "group": [("young", "middle", "old")[int(one // 30)] for one in age.clip(0, 89)],
            "income": income,
        }
    )
    pq.write_table(table, falaj_cluster.root / "tasks.parquet")
    return falaj_cluster


def train(project: Project, case: Case) -> dict[str, Any]:
    """Train and deploy a model, and return the output of training."""
    others = {"old", "group", "income"} - {case.label}
    project.run(
        "jobs.train",
        *case.model,
        f"name={case.name}",
        "training_set=tasks.parquet",
        f"task={case.task}",
        f"label={case.label}",
        "split.column=row",
        f"exclude=[row,{','.join(sorted(others))}]",
        f"output={case.name}.json",
        check=True,
    )
    project.run("serve_apps.deploy", f"name={case.name}", check=True)
    content: dict[str, Any] = json.loads((project.root / f"{case.name}.json").read_text())
    return content


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_a_model_of_each_task_answers_at_both_endpoints(project: Project, case: Case) -> None:
    """A call by key and a stock client get the same answers.

    The metric of the trained model is better than guessing.
    """
    trained = train(project, case)
    assert trained["metrics"][case.quality] > 0.6
    client = Client(project)
    features = {"age": AGES, "code": CODES}
    body = {"entities": [{"row": n} for n in range(3)], "features": features}
    status, by_key = client.call(f"/v1/models/{case.name}:predict", body, unit="u")
    assert status == 200, by_key
    rows = by_key["predictions"]
    assert [set(row) for row in rows] == [case.row] * 3
    stock = StockClient(
        f"127.0.0.1:{client.port}", str(project.storage_root / "tls" / "ca.pem"), client.token
    )
    columns = {
        "age": np.array([np.nan if one is None else one for one in AGES]),
        "code": np.array(CODES, dtype=np.object_),
    }
    answer = stock.infer(case.name, columns, raw=True)
    stock.close()
    assert {one["name"] for one in answer.get_response()["outputs"]} == case.outputs
    check_same(case, rows, answer)


def check_same(case: Case, rows: list[dict[str, Any]], answer: Any) -> None:
    """Compare the answers of both endpoints."""
    for name in case.row:
        found = answer.as_numpy(name).tolist()
        expected = [row[name] for row in rows]
        if name == "probabilities":
            expected = [list(one.values()) for one in expected]
            assert [sum(one) for one in expected] == pytest.approx([1, 1, 1])
        elif name == "label":
            found = [one.decode() if isinstance(one, bytes) else one for one in found]
        assert found == expected


def test_an_int8_version_says_so_and_what_it_cost(project: Project) -> None:
    """The registered metrics of an int8 version show the loss from quantisation.

    Its files contain only one graph.
    """
    trained = json.loads((project.root / f"{CASES[1].name}.json").read_text())
    paid = trained["metrics"]["quantised_from"]
    assert abs(paid["float32"]["accuracy"] - trained["metrics"]["accuracy"]) < 0.05
    assert 0 < paid["mean_score_difference"] <= paid["largest_score_difference"] < 0.1
    folder: Path = project.storage_root / "models" / CASES[1].name / "1"
    assert [path.name for path in folder.glob("*.onnx")] == ["model.onnx"]
