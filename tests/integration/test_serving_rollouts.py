"""Tests of other versions of a served model: in a rollout, as a shadow, removed, and tampered with.

The tests depend on their order. The first test trains version 2, and the other tests use it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import polars as pl

from cluster.ledger.events import ApplicationEnded, ArtifactRefused, PolicyDecided, PolicyEnded
from cluster.node.parts import Part, find_parts
from cluster.records.reading import read_predictions, read_shadow_predictions
from cluster.security.keys.access import key_store
from serve_apps.rollout.evidence.store import EvidenceStore
from tests.projects import loan
from tests.projects.loan import Shop
from tests.servers.polling import wait_until


def test_a_rollout_starts_sticks_and_rolls_back_without_a_lost_request(shop: Shop) -> None:
    """Units keep their variant, and a rollback under constant load loses no request.

    The rollback reaches the edge in less than one second. The edge has counted the rollout's requests by arm.
    """
    project = shop.project
    project.run("jobs.train", *loan.TRAIN, "label_permutation=true", check=True)
    start = ("action=start", "name=loan", "version=2", "weight=50")
    project.run("serve_apps.rollout", *start, check=True)
    wrong = project.run("serve_apps.rollout", "action=promote", "name=loan", "version=1")
    assert (wrong.returncode, "tries version 2, not version 1" in wrong.stderr) == (2, True), wrong.stderr
    used = project.run("serve_apps.deploy", "action=remove", "name=loan", "version=2")
    assert (used.returncode, "the treatment of rollout" in used.stderr) == (2, True), used.stderr
    first = {customer: shop.predict(customer)[1]["variant"] for customer in range(40)}
    again = {customer: shop.predict(customer)[1]["variant"] for customer in range(40)}
    assert first == again
    assert set(first.values()) == {"champion", "challenger"}
    statuses: list[int] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            statuses.append(shop.predict(len(statuses) % loan.NUM_CUSTOMERS)[0])

    thread = threading.Thread(target=load)
    thread.start()
    result = project.run("serve_apps.rollout", "action=rollback", "name=loan", check=True)
    stop.set()
    thread.join()
    rolled_back = json.loads(result.stdout[result.stdout.index("{") :])
    assert rolled_back["rollback_ms"] < 1000
    assert set(statuses) == {200}
    assert {shop.predict(customer)[1]["variant"] for customer in range(40)} == {"champion"}
    evidence = EvidenceStore(project.ledger().engine)
    wait_until(lambda: sum(evidence.requests(rolled_back["rollout"]).values()) >= 80)
    assert evidence.requests(rolled_back["rollout"]).keys() == {"treatment", "control"}


def test_a_policy_promotes_a_version_and_a_command_takes_it_back(shop: Shop) -> None:
    """Without a command, also after `kill -9` of the controller. A replay gives the same decisions.

    After the rollback, the controller ends the application of the version that lost.
    """
    project = shop.project
    policy = (
        *("rollout=canary", "rollout.bake_s=0", "+rollout.steps=[{weight: 20}, {weight: 50}]"),
        *("rollout.event_guardrails=[{event: failure, limit: 0.4}]", "+rollout.watch_s=25"),
    )
    start = ("action=start", "name=loan", "version=2", *policy)
    project.run("serve_apps.rollout", *start, check=True)
    os.kill(find_parts(project.record)[Part.rollouts].pid, signal.SIGKILL)
    ledger = project.ledger()
    deadline = time.monotonic() + 90
    customer = 0
    while ledger.last(PolicyEnded) is None:
        assert time.monotonic() < deadline, ledger.last(PolicyDecided)
        assert shop.predict(customer % loan.NUM_CUSTOMERS)[0] == 200
        customer += 1
    ended = ledger.last(PolicyEnded)
    assert ended is not None
    assert (ended.payload["outcome"], ended.payload["version"]) == ("promoted", 2)
    wait_until(lambda: shop.predict(1)[1]["model_version"] == "2")
    taken_back = project.run("serve_apps.rollout", "action=rollback", "name=loan", check=True)
    assert json.loads(taken_back.stdout[taken_back.stdout.index("{") :])["champion"] == 1
    assert shop.predict(1)[1]["model_version"] == "1"
    export = project.root / "export.jsonl"
    project.run("cluster.ledger", "export", "--output", str(export), check=True)
    replay = project.run("serve_apps.rollout.replay", "--file", str(export), check=True)
    assert "decisions of 1 rollouts are as recorded" in replay.stdout
    wait_until(lambda: ledger.last(ApplicationEnded) is not None, seconds=90)
    assert "loan-v2" not in project.run("cluster.status", check=True).stdout


def test_a_shadow_sees_every_request_and_no_client_sees_it(shop: Shop) -> None:
    """A shadow gets copies of all requests, and clients get only the champion's answers.

    The shadow's predictions are logged beside the answers and can be joined by request id, until the shadow
    is stopped. The replicas of both applications are real.
    """
    project = shop.project
    log, store = loan.log(project), key_store(project.owner)
    project.run("serve_apps.rollout", "action=shadow", "name=loan", "version=2", "share=100", check=True)
    answered: dict[str, str] = {}
    deadline = time.monotonic() + 60
    while (shadows := read_shadow_predictions(log, store)).height < 20:
        assert time.monotonic() < deadline, f"{shadows.height} copies after {len(answered)} answers"
        for customer in range(10):
            status, content = shop.predict(customer)
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


def test_a_version_that_serves_nobody_is_removed(shop: Shop) -> None:
    """Removing an unused version ends its application, and the edge and the status no longer show it.

    A second removal is refused.
    """
    project = shop.project
    remove = ("serve_apps.deploy", "action=remove", "name=loan", "reason=it's old")
    assert "loan-v2" in project.run("cluster.status", check=True).stdout
    project.run(*remove, "version=2", check=True)
    assert "loan-v2" not in project.run("cluster.status", check=True).stdout
    state = project.storage_root / "edge" / "state.json"
    wait_until(lambda: "loan-v2" not in json.loads(state.read_text())["backends"], seconds=20)
    lineage = project.run("cluster.lineage", "--model", "loan", "--version", "2", check=True).stdout
    assert "removed from loan-v2: it's old" in lineage
    refused = project.run(*remove, "version=2")
    assert (refused.returncode, "is not deployed" in refused.stderr) == (2, True), refused.stderr
    assert shop.predict(1)[0] == 200


def test_a_tampered_version_is_refused_and_the_old_one_serves_on(shop: Shop) -> None:
    """The command names the tampered file. The current version continues to serve."""
    project = shop.project
    project.run("jobs.train", *loan.TRAIN, "output=tampered.json", check=True)
    version = json.loads((project.root / "tampered.json").read_text())["version"]
    model = project.storage_root / "models" / "loan" / str(version) / "model.txt"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = project.run("serve_apps.rollout", "action=start", "name=loan", f"version={version}")
    assert result.returncode == 2
    assert "model.txt" in result.stderr
    assert shop.predict(1)[0] == 200
    refused = [entry.payload["version"] for entry in project.ledger().entries(ArtifactRefused)]
    assert refused == [version]
