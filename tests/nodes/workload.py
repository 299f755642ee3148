"""A workload for a cluster of several nodes: an A/B test of two model versions, and a view that takes pushes.

Predictions read 16 features by `account_id`. Pushes write the number of the push as a feature of another view.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import subprocess
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import polars as pl
import sqlalchemy as sa

from cluster.records.location import prediction_log
from cluster.records.reading import read_predictions
from cluster.security.keys.access import key_store
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig
from feature_jobs.store.streaming.push_tables import ANSWERS
from tests.integration.conftest import Project
from tests.nodes.three_nodes import ThreeNodes
from tests.projects import scoring

VIEW, RECENT = "activity", "recent"
DEFINITIONS = f"""{scoring.DEFINITIONS}
{VIEW} = FeatureView(
    "{VIEW}",
    entities=[account],
    source=FileSource("activity.parquet", event_timestamp="at"),
    schema=[Field("number", "int64")],
)
{RECENT} = FeatureService("{RECENT}", views=[{VIEW}])
"""
PUSH, READ = "/v1/features:push", "/v1/features:read"
DURABILITY = "replica.durability=shared"
REPLICAS = ("replica.num_replicas=3", DURABILITY)
DEPLOY_THIRD = ("serve_apps.deploy", f"name={scoring.MODEL}", "version=3", "replica.num_replicas=1")
"""The command that shows that a cluster can deploy again. The version is registered and not deployed before."""


@dataclass(frozen=True, kw_only=True)
class Head(Project):
    """The head of a cluster as a project. Each command gets the options of the cluster."""

    cluster: ThreeNodes

    @property
    def record(self) -> ClusterRecord:
        return self.cluster.head.record

    @property
    def config(self) -> PlatformConfig:
        return self.cluster.config

    def run(self, module: str, *args: str, check: bool = False, **_: Any) -> subprocess.CompletedProcess[str]:
        return self.cluster.head.run(module, *args, *self.cluster.shared, check=check)


def head_of(cluster: ThreeNodes) -> Head:
    """Return the head of a cluster as a project."""
    return Head(root=cluster.head.root, ports={}, env=cluster.head.env, cluster=cluster)


def prepare(cluster: ThreeNodes, *overrides: str, versions: int = 2) -> Head:
    """Put features online, register model versions, and serve two of them on three replicas each.

    Args:
        cluster: the running cluster.
        overrides: options of both deployments, in place of `REPLICAS`.
        versions: number of model versions to register.
    """
    head = head_of(cluster)
    scoring.prepare(head, versions=0)
    for computer in cluster.computers.values():  # replicas look for the code of a view's transform
        (computer.root / "scoring.py").write_text(DEFINITIONS)
    head.run("feature_jobs.apply", "definitions=scoring", check=True)
    for seed in range(versions):
        scoring.register(head, seed=seed)
    scoring.serve(head, *(overrides or REPLICAS))
    return head


def predict_body(number: int) -> dict[str, Any]:
    """Return the body of a request for a prediction."""
    return {"entities": [{"account_id": number % scoring.ACCOUNTS}]}


def push_body(number: int, *, run: str, at: str) -> dict[str, Any]:
    """Return the body of push `number`: one row, for one of the accounts.

    Args:
        number: the value that is pushed.
        run: prefix of the idempotency key.
        at: event time.
    """
    keys = {"account_id": number % scoring.ACCOUNTS}
    row = {"keys": keys, "features": {"number": number}, "event_timestamp": at}
    return {"view": VIEW, "idempotency_key": f"{run}-{number}", "rows": [row]}


def logged_ids(cluster: ThreeNodes) -> list[str]:
    """Return the prediction id of each row of the model's log, wherever it is stored."""
    log = prediction_log(cluster.places, cluster.ledger, scoring.MODEL)
    frame: pl.DataFrame = read_predictions(log, key_store(cluster.owner))
    return [] if frame.is_empty() else frame["prediction_id"].to_list()


def stored_pushes(cluster: ThreeNodes) -> set[str]:
    """Return the hashes of the idempotency keys of all pushes in the push log."""
    with cluster.ledger.engine.connect() as connection:
        rows = connection.execute(sa.select(ANSWERS.c.key_hash).where(ANSWERS.c.view == VIEW))
        return set(rows.scalars())


def key_hash(idempotency_key: str) -> str:
    """Return the hash under which the push log stores an idempotency key."""
    return hashlib.blake2b(idempotency_key.encode(), digest_size=16).hexdigest()


def numbers_of(content: dict[str, Any]) -> list[int | None]:
    """Return the pushed number of each account in an answer of `features:read`."""
    numbers: list[int | None] = content["features"][f"{VIEW}__number"]
    return numbers


def post(url: str, body: dict[str, Any], *, token: str, authority: str) -> tuple[int, dict[str, Any]]:
    """Send one request. Return its status and JSON; the status is 0 if no answer came."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "X-Unit-ID": "1"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        context = ssl.create_default_context(cafile=authority)
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, {}
    except (OSError, ValueError):
        return 0, {}
