"""Tests of a served model through the edge: answers, their rows in the log, and requests that the edge refuses."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import psutil
import pytest

from cluster.host import processes
from cluster.ledger.events import SkewChecked
from cluster.records.reading import count_records, read_predictions
from cluster.records.schema import PredictionRecord
from cluster.records.segments import SegmentWriter
from cluster.security.keys.access import key_store
from tests.projects import loan
from tests.projects.loan import Shop

if TYPE_CHECKING:
    from tests.integration.conftest import Project


def test_another_projects_model_answers_by_key(shop: Shop) -> None:
    """The model of another project reads its features online. Its answers follow the rule in its data."""
    answers = [shop.predict(customer) for customer in (1, 2, 3, 4)]
    assert [status for status, _ in answers] == [200] * 4
    labels = [content["predictions"][0]["label"] for _, content in answers]
    assert labels == [int(customer * 37 % 101 > 50) for customer in (1, 2, 3, 4)]
    assert answers[0][1]["variant"] == "champion"
    assert answers[0][1]["model_version"] == "1"


def test_replicas_listen_on_loopback_only(shop: Shop) -> None:
    """Replicas listen only on loopback.

    This includes their gRPC servers for other deployments, which unpickle what they receive.
    """
    assert shop.predict(1)[0] == 200
    assert set(shop.project.listeners().values()) == {"127.0.0.1"}


def test_nothing_but_replicas_interrupts_what_runs(shop: Shop) -> None:
    """Only replicas have a scheduling policy that interrupts running processes on a busy core.

    Ray's daemons, HAProxy and controllers wait for the end of a time slice.
    """
    policies = {}
    for process in processes.find(shop.project.record.cluster_id):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            kind = " ".join(process.cmdline())
            policies[kind] = {os.sched_getscheduler(thread.id) for thread in process.threads()}
    replicas = {kind: found for kind, found in policies.items() if "ServeReplica" in kind}
    assert len(replicas) >= 3
    assert all(os.SCHED_OTHER in found for found in replicas.values())
    assert all(found == {os.SCHED_BATCH} for kind, found in policies.items() if kind not in replicas)


def test_each_answer_is_one_row_of_the_log(shop: Shop) -> None:
    """Each answer has one row in the log, with the features that the model used."""
    before = count_records(loan.log(shop.project))
    ids = [shop.predict(customer)[1]["prediction_id"] for customer in range(10)]
    rows = read_predictions(loan.log(shop.project), key_store(shop.project.owner))
    assert count_records(loan.log(shop.project)) == before + 10
    mine = rows.filter(pl.col("prediction_id").is_in(ids))
    assert mine.height == 10
    assert mine.filter(pl.col("prediction_id") == ids[1])["income__amount"].to_list() == [37.0]


def test_what_was_served_is_what_offline_data_gives(shop: Shop) -> None:
    """The skew gate passes for correct features and fails for a forged value.

    It leaves out overridden features and counts features that lag.
    """
    project, root = shop.project, shop.project.root
    shop.predict(21, features={"income__amount": 1e6})
    opened = project.run("feature_jobs.skew", "name=loan", check=True).stdout
    assert re.search(
        r"income__amount: compared [1-9]\d*, equal [1-9]\d*, lag 0, .* mismatch 0, smape 0.0", opened
    )
    frame = pl.read_parquet(root / "incomes.parquet").filter(pl.col("customer_id") == 22)
    frame.with_columns(amount=1.5).write_parquet(root / "other_incomes.parquet")
    start = datetime.now(UTC).isoformat()
    ingest = ("definitions=loans", "view=income", "source.path=other_incomes.parquet")
    project.run("feature_jobs.ingest", *ingest, check=True)
    shop.predict(22)
    behind = project.run("feature_jobs.skew", "name=loan", f"since='{start}'", check=True).stdout
    assert "lag 1" in behind
    [event] = [*skew_events(project)][-1:]
    assert (event["mismatches"], event["rows"]) == (0, 1)
    report = json.loads((project.storage_root / event["report"]).read_text())
    assert report["features"]["income__amount"]["lag"] == 1
    forge(project, served=777.0)
    closed = project.run("feature_jobs.skew", "name=loan", f"since='{start}'")
    assert closed.returncode == 2, closed.stderr
    assert "1 served values are not what offline data gives" in closed.stderr


def forge(project: Project, *, served: float) -> None:
    """Append a record as a replica with a different transform would write it."""
    store, [key] = key_store(project.owner), {log_key(path) for path in loan.log(project).iterdir()}
    now = datetime.now(UTC).isoformat()
    record = PredictionRecord(
        prediction_id="forged",
        request_id="",
        time=now,
        model="loan",
        version=1,
        variant="champion",
        rollout="",
        arm="none",
        unit_hash="",
        as_of=loan.AS_OF,
        entities=[{"customer_id": 23}],
        features={"income__amount": [served], "income__sector": ["farm"]},
        predictions=[{"probability": 0.5, "label": 0}],
    )
    writer = SegmentWriter(loan.log(project), store=store, key=key)
    writer.append(record)
    writer.close()


def log_key(path: Path) -> str:
    with path.open("rb") as file:
        return str(json.loads(file.readline())["key"])


def skew_events(project: Project) -> Iterator[dict[str, Any]]:
    return (entry.payload for entry in project.ledger().entries(SkewChecked))


def test_the_inference_protocol_answers_the_same(shop: Shop) -> None:
    """The inference protocol takes and returns named tensors, with the same answer as by key.

    Metadata and readiness are available too.
    """
    by_key = shop.predict(5)[1]["predictions"][0]
    amount, sector = float(5 * 37 % 101), "farm"
    inputs = [
        {"name": "income__amount", "datatype": "FP64", "shape": [1], "data": [amount]},
        {"name": "income__sector", "datatype": "BYTES", "shape": [1, 1], "data": [[sector]]},
    ]
    status, content = shop.call("/v2/models/loan/infer", {"id": "x", "inputs": inputs})
    outputs = {output["name"]: output["data"][0] for output in content["outputs"]}
    assert (status, content["id"], outputs) == (200, "x", by_key)
    status, metadata = shop.call("/v2/models/loan", method="GET")
    assert (status, [one["name"] for one in metadata["inputs"]]) == (
        200,
        ["income__amount", "income__sector"],
    )
    assert shop.call("/v2/models/loan/ready", method="GET")[0] == 200
    assert shop.call("/v2/health/ready", method="GET", token=None)[0] == 200


@pytest.mark.parametrize("entity", [{"customer_id": "x"}, {"person": 1}])
def test_wrong_join_key_gets_a_clear_error(shop: Shop, entity: dict[str, Any]) -> None:
    """The error is JSON with its code, without a stack trace."""
    status, content = shop.call(loan.PREDICT, {"entities": [entity]})
    assert (status, content["code"]) == (400, 400)
    assert "Traceback" not in content["error"]


def test_identity_and_role_are_checked(shop: Shop) -> None:
    """401 without a valid token, 403 for the wrong role, 404 for an unknown model."""
    project = shop.project
    expired, auditor = project.token(ttl_s=-10), project.token("auditor")
    body = {"entities": [{"customer_id": 1}]}
    assert shop.call(loan.PREDICT, body, token=None)[0] == 401
    assert shop.call(loan.PREDICT, body, token=expired)[0] == 401
    assert shop.call(loan.PREDICT, body, token=auditor)[0] == 403
    assert shop.call("/v1/models/nothing:predict", body)[0] == 404


def test_a_replica_checks_the_token_itself(shop: Shop) -> None:
    """A replica that is called directly, not through the edge, refuses a request without a token.

    The replica itself answers: an answer through Serve would have a request id.
    """
    config = (shop.project.storage_root / "edge" / "haproxy.cfg").read_text()
    [(host, port)] = re.findall(r"backend loan-v1\n[\s\S]*?\n    server \S+ (\S+):(\d+) ", config)
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("POST", f"/loan-v1{loan.PREDICT}", b"{}")
    response = connection.getresponse()
    assert response.status == 401
    assert response.getheader("x-request-id") is None
    connection.close()


def test_pushed_features_are_read_and_predicted_with_and_streamed(shop: Shop) -> None:
    """Pushed rows are checked by the view's rules and are online at once.

    The stream writes them to the table. A repeated idempotency key changes nothing.
    """
    project = shop.project
    rows = [
        {
            "keys": {"customer_id": customer},
            "features": {"amount": amount, "sector": "shop"},
            "event_timestamp": "2024-05-01T00:00:00Z",
        }
        for customer, amount in ((5000, 99.0), (5001, -1.0))
    ]
    push = {"view": "income", "rows": rows, "idempotency_key": "first"}
    pushed = {"view": "income", "accepted": 1, "quarantined": [{"row": 1, "reason": "amount outside 0.."}]}
    assert shop.call("/v1/features:push", push) == (200, pushed)
    assert shop.call("/v1/features:push", push) == (200, pushed)
    asked = {
        "service": "credit",
        "entities": [{"customer_id": 5000}, {"customer_id": 1}],
        "as_of": loan.AS_OF,
    }
    status, content = shop.call("/v1/features:read", asked)
    assert status == 200, content
    assert content["features"] == {"income__amount": [99.0, 37.0], "income__sector": ["shop", "farm"]}
    assert content["status"]["income__amount"] == ["present", "present"]
    assert shop.predict(5000)[1]["predictions"][0]["label"] == 1
    streamed = ("source=push", "view=income", "once=true")
    assert (
        "2 pushed rows taken: 1 into the table, 1 quarantined"
        in project.run("feature_jobs.stream", *streamed, check=True).stdout
    )
    assert "0 pushed rows" in project.run("feature_jobs.stream", *streamed, check=True).stdout
    project.run(
        "feature_jobs.materialize", "definitions=loans", "view=income", f"as_of={loan.AS_OF}", check=True
    )
    assert shop.call("/v1/features:read", asked)[1]["features"] == content["features"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("read", {"service": "credits", "entities": [{"customer_id": 1}]}, 404, "'credits' has been applied"),
        ("read", {"service": "credit", "entities": [{"customer": 1}]}, 400, "lacks the key 'customer_id'"),
        ("push", {"view": "incom", "rows": [], "idempotency_key": "k"}, 404, "'incom' has been applied"),
        ("push", {"view": "income", "rows": [], "idempotency_key": "k"}, 400, "1 to 1000"),
        ("push", {"view": "income", "rows": []}, 400, "idempotency_key"),
    ],
)
def test_wrong_feature_requests_are_refused_in_json(
    shop: Shop, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    """The JSON error says what is wrong."""
    answered, content = shop.call(f"/v1/features:{path}", body)
    assert (answered, content["code"]) == (status, status)
    assert words in content["error"]


def test_outcomes_are_taken_and_checked(shop: Shop) -> None:
    """Valid outcomes are accepted. One wrong outcome refuses the whole request, and the error names it."""
    prediction_id = shop.predict(7)[1]["prediction_id"]
    good = {"model": "loan", "outcomes": [{"prediction_id": prediction_id, "outcome": 1}]}
    assert shop.call("/v1/outcomes", good) == (200, {"accepted": 1})
    status, content = shop.call("/v1/outcomes", {"model": "loan", "outcomes": [{"outcome": 1}]})
    assert (status, "outcomes[0]" in content["error"]) == (400, True)
    assert shop.call("/v1/outcomes", good | {"model": "nothing"})[0] == 404
