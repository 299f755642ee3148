"""The life of a version on a real cluster: registered from scikit-learn, evaluated, served, reproduced, retired."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
import skl2onnx
from sklearn.compose import make_column_transformer
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from cluster.ledger.events import ModelEvaluated, ModelReproduced
from tests.integration.client import Client
from tests.integration.conftest import refusal
from tests.projects import loan

if TYPE_CHECKING:
    from tests.integration.conftest import Project

REGISTER = ("name=sk", "artifact=sk.onnx", "reference=loans.parquet", "label=repaid")


@pytest.fixture(scope="module")
def project(loan_project: Project) -> Project:
    """Return the project with the default export of a scikit-learn pipeline, fitted to the training set."""
    rows = pl.read_parquet(loan_project.root / "loans.parquet")
    data = rows.select(amount="income__amount", sector="income__sector").to_pandas()
    columns = make_column_transformer(
        (StandardScaler(), ["amount"]), (OneHotEncoder(handle_unknown="ignore"), ["sector"])
    )
    pipeline = make_pipeline(columns, GradientBoostingClassifier(n_estimators=20)).fit(data, rows["repaid"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = skl2onnx.to_onnx(pipeline, data[:1])
    (loan_project.root / "sk.onnx").write_bytes(graph.SerializeToString())
    return loan_project


def test_a_default_export_of_scikit_learn_is_served(project: Project) -> None:
    """Its inputs are named `amount` and `sector`; it reads the features of the service, like a trained version."""
    registered = project.run("jobs.register", *REGISTER, check=True).stdout
    assert "registered sk version 1 auc 1.0000" in registered
    project.run("serve_apps.deploy", "name=sk", "version=1", check=True)
    answers = [
        Client(project).call(
            "/v1/models/sk:predict",
            {"entities": [{"customer_id": customer}], "as_of": loan.AS_OF},
            unit=str(customer),
        )
        for customer in (1, 2, 3, 4)
    ]
    assert [status for status, _ in answers] == [200] * 4
    labels = [content["predictions"][0]["label"] for _, content in answers]
    assert labels == [int(customer * 37 % 101 > 50) for customer in (1, 2, 3, 4)]


def test_a_version_is_evaluated_without_naming_its_data(project: Project) -> None:
    """The card then has the intervals. A requirement that is not met ends with exit code 2, after the event."""
    options = ("fairness=[income__sector]", "cost.false_positive=1", "cost.false_negative=5")
    result = project.run("jobs.evaluate", "name=loan", "version=1", *options, "output=e.json", check=True)
    evaluated: dict[str, Any] = json.loads((project.root / "e.json").read_text())
    assert evaluated["intervals"]["entity_columns"] == ["customer_id"]
    assert set(evaluated["fairness"]["income__sector"]["groups"]) == {"farm", "shop"}
    assert 0 < evaluated["threshold"]["chosen"] < 1
    assert next(iter(evaluated["attributions"]["inputs"])) == "income__amount"
    assert "evaluated loan version 1 on 100 rows" in result.stdout
    refused = refusal(project.run("jobs.evaluate", "name=loan", "version=1", "require.ece=0.0000001"))
    assert "ece is" in refused
    newest = project.ledger().newest(ModelEvaluated, name="loan", version=1)
    assert newest is not None
    assert newest.payload["requirements"]["ece"]["met"] is False
    page = project.root / "card.html"
    project.run("jobs.model_card", "--model", "loan", "--version", "1", "--output", str(page), check=True)
    assert "NOT met" in page.read_text()


def test_a_version_is_trained_again_with_the_same_weights(project: Project) -> None:
    """Its training set is missing, and is built again. The copy cannot be deployed."""
    rows = project.root / "loans.parquet"
    rows.rename(project.root / "moved.parquet")
    result = project.run("jobs.train", "reproduce=loan/1", check=True)
    assert "model.txt same" in result.stdout
    assert rows.exists()
    event = project.ledger().newest(ModelReproduced, name="loan", version=1)
    assert event is not None
    assert event.payload["training_set"] == "rebuilt"
    assert event.payload["largest_difference"] == 0.0
    assert event.payload["metrics"] == event.payload["libraries"] == {}
    copy = project.run("serve_apps.deploy", f"name={event.payload['copy_name']}")
    assert "only trained to compare with loan/1" in refusal(copy)


def test_a_retired_version_is_not_deployed(project: Project) -> None:
    """A version that serves cannot be retired."""
    serving = refusal(project.run("serve_apps.deploy", "action=retire", "name=loan", "version=1"))
    assert "the champion of 'loan'" in serving
    project.run("jobs.register", *REGISTER, check=True)
    retire = ("action=retire", "name=sk", "version=2", "reason=old data")
    project.run("serve_apps.deploy", *retire, check=True)
    refused = refusal(project.run("serve_apps.deploy", "name=sk", "version=2"))
    assert "retired (old data)" in refused
    assert "version=1" in refused


def test_monitoring_knows_the_reference_of_each_version(project: Project) -> None:
    """Without reference, label and split, also for a registered artifact."""
    assert loan.Shop(project).predict(1)[0] == 200
    for name in ("loan", "sk"):
        result = project.run("jobs.monitor", f"name={name}", f"output={name}.json", check=True)
        assert "champion v1" in result.stdout
        first = json.loads((project.root / f"{name}.json").read_text())
        # The second run takes all chunks from the first one.
        project.run("jobs.monitor", f"name={name}", f"output={name}.json", check=True)
        again = json.loads((project.root / f"{name}.json").read_text())
        assert again["variants"] == first["variants"]
