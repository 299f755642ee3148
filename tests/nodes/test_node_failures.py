"""Tests of failures under load, on one cluster of three nodes. `make chaos-nodes` has more of them.

All tests use the same cluster. Each test repairs it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.ledger.events import JobFinished
from cluster.security.tokens.issuer import write_private_file
from cluster.security.tokens.roles import Role
from tests.nodes import workload
from tests.nodes.failures import FAILURES, VICTIM
from tests.nodes.falaj import Falaj, Lost
from tests.nodes.three_nodes import three_nodes
from tests.nodes.trial import Trial, run_trial

PREDICT_PER_S, PUSH_PER_S = 10.0, 2.0
FAILURE = {failure.name: failure for failure in FAILURES}
NOTHING = Lost(records=0, pushes=0)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Falaj]:
    """Run three nodes with an edge on each, and serve two versions with three replicas each."""
    folder = tmp_path_factory.mktemp("three")
    with three_nodes(folder, workload.DURABILITY, small_disk_of=VICTIM) as cluster:
        workload.prepare(cluster, versions=3)
        yield Falaj(cluster=cluster, predict_per_s=PREDICT_PER_S, push_per_s=PUSH_PER_S)


def fail(system: Falaj, name: str) -> Trial:
    """Let a failure happen under load. Require that no answered prediction or push is lost."""
    trial = run_trial(system, FAILURE[name], system.load(), per_s=system.per_s)
    print(trial.outcome)
    assert system.lost(trial.sent) == NOTHING
    return trial


def test_job_sent_to_any_edge_runs_on_the_head(system: Falaj) -> None:
    """Edges of nodes that joined pass it on. Its log comes back the same way; the client exits as the job did."""
    cluster = system.cluster
    token = cluster.head.root / "engineer.jwt"
    write_private_file(token, cluster.token(role=Role.data_engineer).encode())
    for computer in cluster.computers.values():
        edge = ("--edge", cluster.edges[computer.name], "--ca-file", cluster.certificate_authority)
        job = ("module=feature_jobs.apply", "plan=true")
        answer = computer.run("jobs.submit", "--token-file", str(token), *edge, *job, check=False)
        assert answer.returncode == 0, answer.stderr
        assert "census" in answer.stdout
    finished = [entry.payload for entry in cluster.ledger.entries(JobFinished)]
    assert [event["exit_code"] for event in finished] == [0, 0, 0]


def test_killed_replica_costs_no_request(system: Falaj) -> None:
    """Other replicas answer its requests, those in progress too."""
    assert fail(system, "replica").outcome.reasons == {}


def test_cut_node_costs_no_request_at_other_edges(system: Falaj) -> None:
    """The other edges send requests again that were at its replicas. They also accept pushes."""
    assert fail(system, "cut").outcome.failed_later == 0


def test_full_disk_of_a_node_costs_no_request(system: Falaj) -> None:
    """Its replicas cannot write records. Replicas on other nodes answer instead."""
    assert fail(system, "full_disk").outcome.reasons == {}


def test_killed_postgresql_costs_no_request(system: Falaj) -> None:
    """Requests wait until the database is back, seconds later."""
    assert fail(system, "postgresql").outcome.reasons == {}


def test_dead_head_costs_no_request_at_other_edges(system: Falaj) -> None:
    """`cluster.up` continues the cluster: the other nodes and their replicas stay. Then a model can be deployed.

    Pushes are accepted meanwhile, because replicas hold the keys that they need.
    """
    before = {node.record.node_id for node in system.cluster.nodes}
    raylets = {one.pid for node in system.cluster.nodes for one in node.titled("raylet/raylet")}
    assert fail(system, "head").outcome.failed_elsewhere == 0
    assert {node.record.node_id for node in system.cluster.nodes} == before
    assert {one.pid for node in system.cluster.nodes for one in node.titled("raylet/raylet")} == raylets
    workload.head_of(system.cluster).run(*workload.DEPLOY_THIRD, check=True)
