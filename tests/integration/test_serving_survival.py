"""Tests of the prediction log after a replica was killed, and of compaction beside running replicas.

The ledger is verified at the end.
"""

from __future__ import annotations

import os
import signal

import psutil
from polars.testing import assert_frame_equal

from cluster.host import processes
from cluster.ledger.chain import verify_chain
from cluster.ledger.events import PredictionsCompacted
from cluster.records.reading import count_records, read_outcomes, read_predictions
from cluster.security.keys.access import key_store
from tests.projects import loan
from tests.projects.loan import Shop


def kill_replicas(shop: Shop) -> None:
    """Kill the replicas of version 1, and wait until they are gone."""
    replicas = [one for one in processes.find(shop.project.record.cluster_id) if is_replica(one)]
    assert replicas
    for replica in replicas:
        os.kill(replica.pid, signal.SIGKILL)
    psutil.wait_procs(replicas, timeout=10)


def is_replica(process: psutil.Process) -> bool:
    """Return whether a living process is a replica of version 1."""
    try:
        return "loan-v1" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_a_killed_replica_loses_no_answer_and_no_request(shop: Shop) -> None:
    """After `kill -9` right after an answer, the answer's row is in the log.

    The next request waits for the new replica.
    """
    project = shop.project
    prediction_id = shop.predict(11)[1]["prediction_id"]
    kill_replicas(shop)
    assert [shop.predict(11)[0] for _ in range(5)] == [200] * 5
    logged = read_predictions(loan.log(project), key_store(project.owner))
    assert prediction_id in logged["prediction_id"].to_list()


def test_a_log_is_compacted_beside_its_replicas(shop: Shop) -> None:
    """An ML engineer compacts the log. Segments of killed replicas go into tables, and reads return the same rows."""
    project = shop.project
    log, store = loan.log(project), key_store(project.owner)
    outcomes = project.storage_root / "outcomes" / "loan"
    outcome = {"prediction_id": shop.predict(12)[1]["prediction_id"], "outcome": 1}
    kill_replicas(shop)
    assert shop.call("/v1/outcomes", {"model": "loan", "outcomes": [outcome]})[0] == 200
    before, known, count = read_predictions(log, store), read_outcomes(outcomes, store), count_records(log)
    segments = set(log.glob("*.records"))
    engineer = ("identity.role=ml_engineer", "identity.purpose=testing")
    project.run("jobs.compact_log", "name=loan", *engineer, check=True)
    left = set(log.glob("*.records"))
    assert left < segments
    assert_frame_equal(read_predictions(log, store), before)
    assert_frame_equal(read_outcomes(outcomes, store), known)
    prediction_id = shop.predict(12)[1]["prediction_id"]
    assert count_records(log) == count + 1
    assert prediction_id in read_predictions(log, store)["prediction_id"].to_list()
    again = project.run("jobs.compact_log", "name=loan", *engineer, check=True)
    assert "predictions of loan: 0 segments taken" in again.stdout
    compacted = [entry.payload["model"] for entry in project.ledger().entries(PredictionsCompacted)]
    assert compacted == ["loan"]
    assert project.run("jobs.compact_log", "name=lone", *engineer).returncode == 2
    scientist = ("identity.role=data_scientist", "identity.purpose=testing")
    refused = project.run("jobs.compact_log", "name=loan", *scientist)
    assert (refused.returncode, "may not compact log" in refused.stderr) == (2, True)


def test_the_ledger_of_all_this_verifies(shop: Shop) -> None:
    """The ledger verifies after all tests above."""
    ledger = shop.project.ledger()
    assert sum(1 for _ in verify_chain(ledger.entries())) == ledger.head()
    assert shop.project.run("cluster.ledger", "verify").returncode == 0
