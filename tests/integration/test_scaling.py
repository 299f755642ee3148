"""Tests of scaling to zero.

A version without requests has no replica, and its next request waits for one instead of failing.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

from cluster.records.reading import read_predictions
from cluster.records.unit_hash import unit_hash, unit_key
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.edge_proof import edge_proof
from cluster.security.keys.access import key_store
from cluster.storage import layout
from tests.clients.serve_status import deployment, running_replicas
from tests.integration.client import Client
from tests.servers.polling import wait_until
from tests.servers.replica import MODEL, register

if TYPE_CHECKING:
    from tests.integration.conftest import Project

SIGNATURE = ModelSignature(
    task=Task.regression, inputs=(InputSpec(name="amount", dtype="double"),), label="value"
)
BODY = {"entities": [{"id": 1}], "features": {"amount": 2.0}}
PREDICT = f"/v1/models/{MODEL}:predict"
APP = f"{MODEL}-v1"
SHORT = (
    "replica.min_replicas=0",
    "replica.max_replicas=2",
    "replica.target_ongoing_requests=0.01",
    "replica.upscale_delay_s=1",
    "replica.downscale_to_zero_delay_s=1",
    "replica.downscale_delay_s=1",
    "replica.look_back_s=3",
)


class Version(Client):
    """A version that soon scales to zero, with its state in Serve and at the edge."""

    def deployment(self) -> dict[str, Any]:
        return deployment(self.project.record, APP)

    def replicas(self) -> set[str]:
        return running_replicas(self.project.record, APP)

    def backend(self) -> str:
        """Return the version's backend in HAProxy's configuration, or an empty text."""
        text = (self.project.storage_root / "edge" / "haproxy.cfg").read_text()
        return (
            text.split(f"backend {APP}\n", 1)[1].split("\nbackend ", 1)[0]
            if f"backend {APP}\n" in text
            else ""
        )

    def is_woken_by_serve(self) -> bool:
        """Return whether Serve's proxy is a regular server of the backend, not only the backup of the replicas."""
        proxy = rf":{self.project.record.ports['serve_http']} check$"
        return re.search(proxy, self.backend(), re.MULTILINE) is not None

    def is_asleep(self) -> bool:
        wanted = self.deployment()["target_num_replicas"]
        return not wanted and not self.replicas() and self.is_woken_by_serve()

    def answered(self) -> pl.DataFrame:
        folder = self.project.storage_root / "predictions" / MODEL
        return read_predictions(folder, key_store(self.project.owner))


@pytest.fixture(scope="module")
def version(falaj_cluster: Project) -> Version:
    register(falaj_cluster.root / "scaled", falaj_cluster.config, SIGNATURE, falaj_cluster.owner)
    falaj_cluster.run("serve_apps.deploy", f"name={MODEL}", "version=1", *SHORT, check=True)
    return Version(falaj_cluster)


def test_an_idle_version_sleeps_and_its_first_requests_wait(version: Version) -> None:
    """An idle version has no replica, and requests that arrive while it starts wait for it.

    Each answer has one row, with the variant, the arm and the hash of the unit.
    """
    wait_until(version.is_asleep, "asleep", seconds=90)
    assert version.replicas() == set()
    before = version.answered().height
    answers: dict[str, tuple[int, dict[str, Any]]] = {}

    def ask(unit: str) -> None:
        answers[unit] = version.call(PREDICT, BODY, unit=unit)

    threads = [threading.Thread(target=ask, args=(f"u{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers.values()] == [200] * 4
    rows, places = version.answered(), layout(version.project.config.storage)
    assert rows.height == before + 4
    for unit, (_, content) in answers.items():
        [row] = rows.filter(pl.col("prediction_id") == content["prediction_id"]).to_dicts()
        said = (row["variant"], row["arm"], row["unit_hash"], len(row["request_id"]))
        digest = unit_hash(unit_key(edge_proof(places)), rollout="", unit=unit.encode())
        assert said == ("champion", "outside", digest, 36)


def test_once_awake_it_is_addressed_directly_and_scaled_while_it_is_asked(version: Version) -> None:
    """A running version gets requests directly from the edge and scales up under load.

    The load is short requests, one after the other. A count of ongoing requests that is taken now and then
    never sees them.
    """

    def is_addressed_directly() -> bool:
        assert version.call(PREDICT, BODY)[0] == 200  # keeps it awake
        return bool(version.backend()) and not version.is_woken_by_serve()

    wait_until(is_addressed_directly, "addressed directly", seconds=90)
    first = version.replicas()
    statuses: set[int] = set()

    def asked_for(seconds: float) -> set[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            statuses.add(version.call(PREDICT, BODY)[0])
            threading.Event().wait(0.02)
        return version.replicas()

    wait_until(lambda: len(asked_for(1)) == 2, "scaled up", seconds=90)
    assert first <= asked_for(10)
    assert statuses == {200}


def test_no_request_is_lost_while_the_last_replica_leaves(version: Version) -> None:
    """No request is lost, although the edge learns a little later that the last replica has gone."""
    wait_until(lambda: version.deployment()["target_num_replicas"] == 0, "scaled to zero", seconds=90)
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(version.call(PREDICT, BODY)[0])) for _ in range(40)
    ]
    for thread in threads:
        thread.start()
        threading.Event().wait(0.05)
    for thread in threads:
        thread.join()
    assert statuses == [200] * 40


def test_a_deployment_that_sleeps_is_deployed(version: Version) -> None:
    """Deploying a version that is scaled to zero starts no replica and does not wait for one."""
    wait_until(version.is_asleep, "asleep", seconds=90)
    version.project.run("serve_apps.deploy", f"name={MODEL}", "version=1", *SHORT, check=True)
    assert version.replicas() == set()


def test_a_killed_champion_is_not_taken_for_one_that_sleeps(version: Version) -> None:
    """A killed champion is not treated as scaled to zero.

    A champion has no fallback, so its requests wait until Serve has restarted it.
    """

    def is_addressed_directly() -> bool:
        assert version.call(PREDICT, BODY)[0] == 200  # keeps it awake
        return bool(version.backend()) and not version.is_woken_by_serve()

    wait_until(is_addressed_directly, "addressed directly", seconds=90)
    for replica in version.deployment()["replicas"]:
        if replica["state"] == "RUNNING":
            os.kill(replica["pid"], signal.SIGKILL)
    assert [version.call(PREDICT, BODY)[0] for _ in range(5)] == [200] * 5
    assert not version.is_asleep()
