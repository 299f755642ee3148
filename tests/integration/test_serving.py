"""Somebody else's project, from an empty folder to answers through the edge, and what happens when things go wrong.

The project has its own data, definitions and configuration; nothing of this repository is edited.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import psutil
import pytest
from polars.testing import assert_frame_equal

from cluster import processes
from cluster.ledger import open_ledger
from cluster.ledger.chain import verify_chain
from cluster.ledger.events import ArtifactRefused, PredictionsCompacted, SkewChecked
from cluster.records import (
    PredictionRecord,
    SegmentWriter,
    count_records,
    read_outcomes,
    read_predictions,
    read_shadow_predictions,
)
from cluster.security.keys.access import key_store
from cluster.settings import PlatformConfig, StorageConfig
from tests.clients.stock_client import StockClient, wanted
from tests.integration.client import Client

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from datetime import timedelta
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, NotNull, Range

customer = Entity("customer", join_keys=["customer_id"])
income = FeatureView(
    "income",
    entities=[customer],
    ttl=timedelta(days=365),
    source=FileSource("income.parquet", event_timestamp="at"),
    schema=[Field("amount", "float64"), Field("sector", "string")],
    checks=[NotNull("amount"), Range("amount", minimum=0)],
)
credit = FeatureService("credit", views=[income])
"""
MODEL = """
family: lightgbm
rounds: 40
min_data_in_leaf: 5
num_threads: 1
"""
NUM_CUSTOMERS = 400
PREDICT = "/v1/models/loan:predict"
AS_OF = "2024-06-01T00:00:00Z"


class Shop(Client):
    """Asks for a customer's loan."""

    def predict(self, customer: int, **more: Any) -> tuple[int, dict[str, Any]]:
        body = {"entities": [{"customer_id": customer}], "as_of": AS_OF, **more}
        return self.call(PREDICT, body, unit=str(customer))


@pytest.fixture(scope="module")
def project(falaj_cluster: Project) -> Iterator[Project]:
    """A project that has come from its own files to a served model."""
    root = falaj_cluster.root
    (root / "shop.py").write_text(DEFINITIONS)
    (root / "conf" / "model").mkdir(parents=True)
    (root / "conf" / "model" / "small.yaml").write_text(MODEL)
    write_data(root)
    run = falaj_cluster.run
    run("feature_jobs.apply", "definitions=shop", check=True)
    run("feature_jobs.ingest", "definitions=shop", "view=income", check=True)
    training = ("service=credit", "entities=people.parquet", "output=train.parquet")
    run("feature_jobs.training_set", "definitions=shop", *training, check=True)
    run("feature_jobs.materialize", "definitions=shop", "view=income", f"as_of={AS_OF}", check=True)
    run("jobs.train", *train_arguments(), check=True)
    run("serve_apps.deploy", "name=loan", "version=1", check=True)
    return falaj_cluster


def write_data(root: Path) -> None:
    ids = list(range(NUM_CUSTOMERS))
    amounts = [float(number * 37 % 101) for number in ids]
    frame = pl.DataFrame(
        {
            "customer_id": ids,
            "at": ["2024-01-01T00:00:00"] * len(ids),
            "amount": amounts,
            "sector": ["farm" if number % 3 else "shop" for number in ids],
        }
    ).with_columns(pl.col("at").str.to_datetime(time_unit="us", time_zone="UTC"))
    frame.write_parquet(root / "income.parquet")
    people = frame.select(
        "customer_id", event_timestamp=pl.lit("2024-03-01").str.to_datetime(time_unit="us", time_zone="UTC")
    )
    people.with_columns(repaid=(frame["amount"] > 50).cast(pl.Int64)).write_parquet(root / "people.parquet")


def train_arguments() -> tuple[str, ...]:
    split = ("split.column=customer_id", "split.modulo=4", "split.remainder=3")
    return (
        "--config-dir",
        "conf",
        "model=small",
        "name=loan",
        "training_set=train.parquet",
        "label=repaid",
        *split,
    )


@pytest.fixture
def client(project: Project) -> Shop:
    return Shop(project)


def predictions(project: Project) -> Path:
    return project.storage_root / "predictions" / "loan"


def test_another_projects_model_answers_by_key(client: Shop) -> None:
    """Features are read online; the model has learned the rule of its data."""
    answers = [client.predict(customer) for customer in (1, 2, 3, 4)]
    assert [status for status, _ in answers] == [200] * 4
    labels = [content["predictions"][0]["label"] for _, content in answers]
    assert labels == [int(customer * 37 % 101 > 50) for customer in (1, 2, 3, 4)]
    assert answers[0][1]["variant"] == "champion"
    assert answers[0][1]["model_version"] == "1"


def test_replicas_listen_on_loopback_only(client: Shop) -> None:
    """Their gRPC servers for other deployments too, which unpickle what they are sent."""
    assert client.predict(1)[0] == 200
    assert set(client.project.listeners().values()) == {"127.0.0.1"}


def test_nothing_but_replicas_interrupts_what_runs(client: Shop) -> None:
    """On a busy core; Ray's daemons, HAProxy and controllers wait for the end of a slice."""
    policies = {}
    for process in processes.find(client.project.record.cluster_id):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            kind = " ".join(process.cmdline())
            policies[kind] = {os.sched_getscheduler(thread.id) for thread in process.threads()}
    replicas = {kind: found for kind, found in policies.items() if "ServeReplica" in kind}
    assert len(replicas) >= 3
    assert all(os.SCHED_OTHER in found for found in replicas.values())
    assert all(found == {os.SCHED_BATCH} for kind, found in policies.items() if kind not in replicas)


def test_each_answer_is_one_row_of_the_log(client: Shop) -> None:
    """With the features as they were used."""
    before = count_records(predictions(client.project))
    ids = [client.predict(customer)[1]["prediction_id"] for customer in range(10)]
    rows = read_predictions(predictions(client.project), key_store(client.project.owner))
    assert count_records(predictions(client.project)) == before + 10
    mine = rows.filter(pl.col("prediction_id").is_in(ids))
    assert mine.height == 10
    assert mine.filter(pl.col("prediction_id") == ids[1])["income__amount"].to_list() == [37.0]


def test_what_was_served_is_what_offline_data_gives(client: Shop) -> None:
    """The gate opens for honest features, overrides left out, counts what lags, and closes on a forged value."""
    project, root = client.project, client.project.root
    client.predict(21, features={"income__amount": 1e6})
    opened = project.run("feature_jobs.skew", "name=loan", check=True).stdout
    assert re.search(
        r"income__amount: compared [1-9]\d*, equal [1-9]\d*, lag 0, .* mismatch 0, smape 0.0", opened
    )
    frame = pl.read_parquet(root / "income.parquet").filter(pl.col("customer_id") == 22)
    frame.with_columns(amount=1.5).write_parquet(root / "other.parquet")
    start = datetime.now(UTC).isoformat()
    ingest = ("definitions=shop", "view=income", "source.path=other.parquet")
    project.run("feature_jobs.ingest", *ingest, check=True)
    client.predict(22)
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
    """A record as a replica with another transform would write it."""
    store, [key] = key_store(project.owner), {log_key(path) for path in predictions(project).iterdir()}
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
        as_of=AS_OF,
        entities=[{"customer_id": 23}],
        features={"income__amount": [served], "income__sector": ["farm"]},
        predictions=[{"probability": 0.5, "label": 0}],
    )
    writer = SegmentWriter(predictions(project), store=store, key=key)
    writer.append(record)
    writer.close()


def log_key(path: Path) -> str:
    with path.open("rb") as file:
        return str(json.loads(file.readline())["key"])


def skew_events(project: Project) -> Iterator[dict[str, Any]]:
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(project.storage_root))))
    return (entry.payload for entry in ledger.entries(SkewChecked))


def test_the_inference_protocol_answers_the_same(client: Shop) -> None:
    """Named tensors in, named tensors out; metadata and readiness beside it."""
    by_key = client.predict(5)[1]["predictions"][0]
    amount, sector = float(5 * 37 % 101), "farm"
    inputs = [
        {"name": "income__amount", "datatype": "FP64", "shape": [1], "data": [amount]},
        {"name": "income__sector", "datatype": "BYTES", "shape": [1, 1], "data": [[sector]]},
    ]
    status, content = client.call("/v2/models/loan/infer", {"id": "x", "inputs": inputs})
    outputs = {output["name"]: output["data"][0] for output in content["outputs"]}
    assert (status, content["id"], outputs) == (200, "x", by_key)
    status, metadata = client.call("/v2/models/loan", method="GET")
    assert (status, [one["name"] for one in metadata["inputs"]]) == (
        200,
        ["income__amount", "income__sector"],
    )
    assert client.call("/v2/models/loan/ready", method="GET")[0] == 200
    assert client.call("/v2/health/ready", method="GET", token=None)[0] == 200


def test_a_stock_client_works_unchanged(client: Shop) -> None:
    """NVIDIA's, as JSON and as binary data, gets what `:predict` answers; each answer is in the log."""
    project = client.project
    ca_file = project.storage_root / "tls" / "ca.pem"
    triton = StockClient(f"127.0.0.1:{client.port}", str(ca_file), client.token)
    headers = triton.headers
    assert triton.client.is_server_live(headers=headers)
    assert triton.client.is_server_ready(headers=headers)
    assert triton.client.get_server_metadata(headers=headers)["name"] == "falaj"
    assert triton.client.is_model_ready("loan", "1", headers=headers)
    assert not triton.client.is_model_ready("loan", "99", headers=headers)
    assert triton.client.get_model_metadata("loan", headers=headers)["versions"] == ["1"]
    customers = range(5)
    columns = {
        "income__amount": np.array([float(one * 37 % 101) for one in customers]),
        "income__sector": np.array(["farm" if one % 3 else "shop" for one in customers], dtype=np.object_),
    }
    expected = [client.predict(one)[1]["predictions"][0] for one in customers]
    for raw in (False, True):
        result = triton.infer("loan", columns, raw=raw, request_id="mine")
        assert result.get_response()["id"] == "mine"
        assert result.as_numpy("probability").tolist() == [one["probability"] for one in expected]
        only = triton.infer("loan", columns, raw=raw, outputs=[wanted("label", raw=not raw)])
        assert only.as_numpy("label").tolist() == [one["label"] for one in expected]
        assert only.as_numpy("probability") is None
        prediction_id = only.get_response()["parameters"]["prediction_id"]
        log = read_predictions(predictions(project), key_store(project.owner))
        assert log.filter(pl.col("prediction_id") == prediction_id).height == len(expected)
    triton.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"entities":[{"customer_id":NaN}]}', 400),
        (b'{"entities":[{"customer_id":"x"}]}', 400),
        (b'{"entities":[{"person":1}]}', 400),
        (b'{"entities":[{"customer_id":1}],"features":{"income__amount":"rich"}}', 400),
        (b'{"entities":[{"customer_id":1}],"features":{"income__amount":NaN}}', 400),
        (b"[" * 100_000, 400),
        (b" " * 2_000_000, 413),
    ],
)
def test_bad_bodies_get_a_clear_error(client: Shop, body: bytes, status: int) -> None:
    """JSON with its code, and no stack trace."""
    answered, content = client.call(PREDICT, body)
    assert (answered, content["code"]) == (status, status)
    assert "Traceback" not in content["error"]


def test_identity_and_role_are_checked(client: Shop) -> None:
    """401 without a valid token, 403 with the wrong role, 404 for an unknown model."""
    project = client.project
    expired, auditor = project.token(ttl_s=-10), project.token("auditor")
    body = {"entities": [{"customer_id": 1}]}
    assert client.call(PREDICT, body, token=None)[0] == 401
    assert client.call(PREDICT, body, token=expired)[0] == 401
    assert client.call(PREDICT, body, token=auditor)[0] == 403
    assert client.call("/v1/models/nothing:predict", body)[0] == 404


def test_a_replica_checks_the_token_itself(client: Shop) -> None:
    """Addressed directly, behind the edge's back, it refuses too; and by itself, for what Serve handles has its id."""
    config = (client.project.storage_root / "edge" / "haproxy.cfg").read_text()
    [(host, port)] = re.findall(r"backend loan-v1\n[\s\S]*?\n    server \S+ (\S+):(\d+) ", config)
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("POST", f"/loan-v1{PREDICT}", b"{}")
    response = connection.getresponse()
    assert response.status == 401
    assert response.getheader("x-request-id") is None
    connection.close()


def test_pushed_features_are_read_and_predicted_with_and_streamed(client: Shop, project: Project) -> None:
    """At once online, by the view's own checks; in the table when the stream has run; once for a key."""
    rows = [
        {
            "keys": {"customer_id": customer},
            "features": {"amount": amount, "sector": "shop"},
            "event_timestamp": "2024-05-01T00:00:00Z",
        }
        for customer, amount in ((5000, 99.0), (5001, -1.0))
    ]
    push = {"view": "income", "rows": rows, "idempotency_key": "first"}
    pushed = {
        "view": "income",
        "accepted": 1,
        "quarantined": [{"row": 1, "reason": "amount outside 0.."}],
    }
    assert client.call("/v1/features:push", push) == (200, pushed)
    assert client.call("/v1/features:push", push) == (200, pushed)
    asked = {"service": "credit", "entities": [{"customer_id": 5000}, {"customer_id": 1}], "as_of": AS_OF}
    status, content = client.call("/v1/features:read", asked)
    assert status == 200, content
    assert content["features"] == {"income__amount": [99.0, 37.0], "income__sector": ["shop", "farm"]}
    assert content["status"]["income__amount"] == ["present", "present"]
    assert client.predict(5000)[1]["predictions"][0]["label"] == 1
    streamed = ("source=push", "view=income", "once=true")
    assert (
        "2 pushed rows taken: 1 into the table, 1 quarantined"
        in project.run("feature_jobs.stream", *streamed, check=True).stdout
    )
    assert "0 pushed rows" in project.run("feature_jobs.stream", *streamed, check=True).stdout
    project.run("feature_jobs.materialize", "definitions=shop", "view=income", f"as_of={AS_OF}", check=True)
    assert client.call("/v1/features:read", asked)[1]["features"] == content["features"]


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
    client: Shop, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    """Saying what is wrong."""
    answered, content = client.call(f"/v1/features:{path}", body)
    assert (answered, content["code"]) == (status, status)
    assert words in content["error"]


def test_outcomes_are_taken_and_checked(client: Shop) -> None:
    """A wrong one refuses the request and is named."""
    prediction_id = client.predict(7)[1]["prediction_id"]
    good = {"model": "loan", "outcomes": [{"prediction_id": prediction_id, "outcome": 1}]}
    assert client.call("/v1/outcomes", good) == (200, {"accepted": 1})
    status, content = client.call("/v1/outcomes", {"model": "loan", "outcomes": [{"outcome": 1}]})
    assert (status, "outcomes[0]" in content["error"]) == (400, True)
    assert client.call("/v1/outcomes", good | {"model": "nothing"})[0] == 404


def test_a_rollout_starts_sticks_and_rolls_back_without_a_lost_request(client: Shop) -> None:
    """Under constant load; a rollback reaches the edge in under a second."""
    project = client.project
    project.run("jobs.train", *train_arguments(), "label_permutation=true", check=True)
    start = ("action=start", "name=loan", "version=2", "weight=50")
    project.run("serve_apps.rollout", *start, check=True)
    wrong = project.run("serve_apps.rollout", "action=promote", "name=loan", "version=1")
    assert (wrong.returncode, "tries version 2, not version 1" in wrong.stderr) == (2, True), wrong.stderr
    used = project.run("serve_apps.deploy", "action=remove", "name=loan", "version=2")
    assert (used.returncode, "the treatment of rollout" in used.stderr) == (2, True), used.stderr
    first = {customer: client.predict(customer)[1]["variant"] for customer in range(40)}
    again = {customer: client.predict(customer)[1]["variant"] for customer in range(40)}
    assert first == again
    assert set(first.values()) == {"champion", "challenger"}
    statuses: list[int] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            statuses.append(client.predict(len(statuses) % NUM_CUSTOMERS)[0])

    thread = threading.Thread(target=load)
    thread.start()
    result = project.run("serve_apps.rollout", "action=rollback", "name=loan", check=True)
    stop.set()
    thread.join()
    assert json.loads(result.stdout[result.stdout.index("{") :])["rollback_ms"] < 1000
    assert set(statuses) == {200}
    assert {client.predict(customer)[1]["variant"] for customer in range(40)} == {"champion"}


def test_a_shadow_sees_every_request_and_no_client_sees_it(client: Shop) -> None:
    """Real replicas of two applications: its predictions lie beside the answers by request id, until it is stopped."""
    project = client.project
    log, store = predictions(project), key_store(project.owner)
    project.run("serve_apps.rollout", "action=shadow", "name=loan", "version=2", "share=100", check=True)
    answered: dict[str, str] = {}
    deadline = time.monotonic() + 60
    while (shadows := read_shadow_predictions(log, store)).height < 20:
        assert time.monotonic() < deadline, f"{shadows.height} copies after {len(answered)} answers"
        for customer in range(10):
            status, content = client.predict(customer)
            assert (status, content["variant"]) == (200, "champion")
            answered[content["prediction_id"]] = content["model_version"]
    project.run("serve_apps.rollout", "action=stop_shadow", "name=loan", check=True)
    assert set(shadows.select("version", "variant", "arm").rows()) == {(2, "shadow", "shadow")}
    served = read_predictions(log, store)
    pairs = shadows.join(served, on="request_id", suffix="_answered")
    assert pairs.height == shadows.height
    assert set(pairs["prediction_id_answered"]) <= set(answered)
    assert pairs["income__amount"].to_list() == pairs["income__amount_answered"].to_list()
    assert served.filter(pl.col("prediction_id").is_in(shadows["prediction_id"].to_list())).is_empty()


def test_a_version_that_serves_nobody_is_removed(client: Shop) -> None:
    """Its application ends, the edge and the status hear of it, and a second time there is nothing to remove."""
    project = client.project
    remove = ("serve_apps.deploy", "action=remove", "name=loan", "reason=it's old")
    assert "loan-v2" in project.run("cluster.status", check=True).stdout
    project.run(*remove, "version=2", check=True)
    assert "loan-v2" not in project.run("cluster.status", check=True).stdout
    state = project.storage_root / "edge" / "state.json"
    deadline = time.monotonic() + 20
    while "loan-v2" in json.loads(state.read_text())["backends"]:
        assert time.monotonic() < deadline, "the edge keeps it"
        threading.Event().wait(0.1)
    lineage = project.run("cluster.lineage", "--model", "loan", "--version", "2", check=True).stdout
    assert "removed from loan-v2: it's old" in lineage
    refused = project.run(*remove, "version=2")
    assert (refused.returncode, "is not deployed" in refused.stderr) == (2, True), refused.stderr
    assert client.predict(1)[0] == 200


def test_a_killed_replica_loses_no_answer_and_no_request(client: Shop) -> None:
    """kill -9 right after an answer: its row is in the log, and the next request waits for the new replica."""
    project = client.project
    prediction_id = client.predict(11)[1]["prediction_id"]
    replicas = [
        one for one in processes.find(project.record.cluster_id) if "loan-v1" in " ".join(one.cmdline())
    ]
    assert replicas
    for replica in replicas:
        os.kill(replica.pid, signal.SIGKILL)
    psutil.wait_procs(replicas, timeout=10)
    assert [client.predict(11)[0] for _ in range(5)] == [200] * 5
    assert (
        prediction_id
        in read_predictions(predictions(project), key_store(project.owner))["prediction_id"].to_list()
    )


def test_a_log_is_compacted_beside_its_replicas(client: Shop) -> None:
    """By an ML engineer: what replicas of before wrote is in tables, what lives goes on, and nothing else changes."""
    project = client.project
    log, store = predictions(project), key_store(project.owner)
    outcomes = project.storage_root / "outcomes" / "loan"
    before, known, count = read_predictions(log, store), read_outcomes(outcomes, store), count_records(log)
    segments = set(log.glob("*.records"))
    engineer = ("identity.role=ml_engineer", "identity.purpose=testing")
    project.run("jobs.compact_log", "name=loan", *engineer, check=True)
    left = set(log.glob("*.records"))
    assert left < segments
    assert_frame_equal(read_predictions(log, store), before)
    assert_frame_equal(read_outcomes(outcomes, store), known)
    prediction_id = client.predict(12)[1]["prediction_id"]
    assert count_records(log) == count + 1
    assert prediction_id in read_predictions(log, store)["prediction_id"].to_list()
    again = project.run("jobs.compact_log", "name=loan", *engineer, check=True)
    assert "predictions of loan: 0 segments taken" in again.stdout
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(project.storage_root))))
    assert [entry.payload["model"] for entry in ledger.entries(PredictionsCompacted)] == ["loan"]
    assert project.run("jobs.compact_log", "name=lone", *engineer).returncode == 2
    scientist = ("identity.role=data_scientist", "identity.purpose=testing")
    refused = project.run("jobs.compact_log", "name=loan", *scientist)
    assert (refused.returncode, "may not compact log" in refused.stderr) == (2, True)


def test_a_tampered_version_is_refused_and_the_old_one_serves_on(client: Shop) -> None:
    """The command says which file; what serves goes on."""
    project = client.project
    project.run("jobs.train", *train_arguments(), check=True)
    model = project.storage_root / "models" / "loan" / "3" / "model.txt"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = project.run("serve_apps.rollout", "action=start", "name=loan", "version=3")
    assert result.returncode == 2
    assert "model.txt" in result.stderr
    assert client.predict(1)[0] == 200
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(project.storage_root))))
    assert [entry.payload["version"] for entry in ledger.entries(ArtifactRefused)] == [3]


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("feature_jobs.ingest", ("definitions=shop", "view=incme"), "Did you mean 'income'"),
        (
            "feature_jobs.ingest",
            ("definitions=shop", "view=income", "source.path=none.parquet"),
            "none.parquet",
        ),
        ("feature_jobs.ingest", ("definitions=shop", "view=income", "source.path=shop.py"), "shop.py"),
        ("feature_jobs.ingest", ("definitions=shop", "view=income", "source.path=people.parquet"), "amount"),
        ("feature_jobs.apply", ("definitions=nothing",), "nothing"),
        (
            "feature_jobs.training_set",
            ("service=crdit", "entities=people.parquet", "output=x.parquet"),
            "credit",
        ),
        (
            "feature_jobs.training_set",
            ("service=credit", "entities=none.parquet", "output=x.parquet"),
            "none.parquet",
        ),
        (
            "jobs.train",
            ("name=loan", "training_set=train.parquet", "label=nothing", "split.column=null"),
            "nothing",
        ),
        ("jobs.evaluate", ("name=lone", "training_set=train.parquet"), "Did you mean 'loan'"),
        ("serve_apps.deploy", ("name=loan", "version=99"), "no version 99"),
        ("serve_apps.rollout", ("action=promote", "name=loan"), "No rollout"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    project: Project, module: str, arguments: tuple[str, ...], said: str
) -> None:
    """Exit code 2, what, which, what to do."""
    result = project.run(module, *arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 2, result.stderr[-2000:]
    assert len(lines) == 1
    assert said in lines[0]


def test_a_job_runs_under_ray_job_submit(project: Project) -> None:
    """The same line; a refusal's exit code is in the job's details."""
    done = submit(project, "feature_jobs.apply", "definitions=shop")
    refused = submit(project, "feature_jobs.ingest", "definitions=shop", "view=incme")
    assert (done["status"], done["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert (refused["status"], refused["driver_exit_code"]) == ("FAILED", 2)


def submit(project: Project, module: str, *arguments: str) -> dict[str, Any]:
    submission = f"test-{module}-{time.time_ns()}"
    command = ["job", "submit", "--submission-id", submission, "--working-dir", ".", "--"]
    project.run_python("-m", "ray.scripts.scripts", *command, "python", "-m", module, *arguments)
    from urllib.request import Request, urlopen

    request = Request(f"{project.record.dashboard_url}/api/jobs/{submission}")
    request.add_header("Authorization", f"Bearer {Path(project.record.token_path).read_text()}")
    with urlopen(request, timeout=10) as response:
        details: dict[str, Any] = json.load(response)
    return details


def test_the_ledger_of_all_this_verifies(project: Project) -> None:
    """After everything above."""
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(project.storage_root))))
    assert sum(1 for _ in verify_chain(ledger.entries())) == ledger.head()
    assert project.run("cluster.ledger", "verify").returncode == 0
