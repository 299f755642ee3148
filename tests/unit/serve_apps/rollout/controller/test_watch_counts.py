"""The counts of a holdback are registered without a loss of other counts, and removed after its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger.events import AliasMoved, PolicySummarised
from serve_apps.rollout import transitions
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.evidence import store as evidence_store
from serve_apps.rollout.evidence.store import EvidenceStore
from serve_apps.rollout.evidence.tables import UNITS
from serve_apps.rollout.history import read_history
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.serving_state import read_states
from tests.samples.access_records import line
from tests.samples.policies import SPEC, WITH_POLICY, permitted
from tests.samples.rollout_evidence import Node
from tests.samples.rollouts import DEPLOYED, STARTED


class Cluster(NamedTuple):
    """A ledger with a running rollout with a holdback, its counts, and an edge."""

    ledger: Ledger
    store: EvidenceStore
    node: Node

    def controller(self) -> Controller:
        """Return a new controller."""
        return Controller(self.ledger, self.store, refusal=permitted)

    def promote(self) -> None:
        """Promote version 2, as an operator does."""
        history, rollout = read_history(self.ledger, "m"), read_states(self.ledger)["m"].rollout
        assert rollout is not None
        ending = transitions.Ending(model="m", rollout=rollout, run=history.run, reason="by command")
        for event in transitions.promotion(ending, champion=1):
            self.ledger.append(event, actor="ann")

    def write_and_count(self) -> None:
        """Count two units of the holdback at the edge."""
        self.node.write(*(held("A"), held("B")))
        self.node.reader.collect()

    def units(self) -> int:
        """Return the number of stored units of the holdback."""
        query = sa.select(sa.func.count()).select_from(UNITS).where(UNITS.c.rollout == "r-watch")
        with self.node.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())


def held(unit: str) -> bytes:
    """Return the record of a unit that the holdback compares."""
    return line(rollout="r-watch", below="100", variant="champion", unit_hash=unit * 16)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    plan = as_json(replace(SPEC, holdback=True).plan())
    for event in (*DEPLOYED, STARTED, replace(WITH_POLICY, plan=plan)):
        ledger.append(event, actor="ann")
    store = EvidenceStore(ledger.engine)
    store.register("r", evidence_store.Counting())
    return Cluster(ledger, store, Node(ledger, tmp_path / "access"))


@pytest.mark.parametrize("looks_before", [0, 1])
def test_promotion_by_an_operator_loses_no_counts(cluster: Cluster, looks_before: int) -> None:
    """No edge reads its files again, and the summary has the rollout's requests.

    After a look at the rollout, the holdback is counted from its first request on.
    """
    ledger, store, node = cluster
    node.write(line(rollout="r"), line(rollout="r", arm="control", unit_hash="C" * 16))
    node.reader.collect()
    acting = cluster.controller()
    for _ in range(looks_before):
        acting.check_once()
    cluster.promote()
    cluster.write_and_count()
    acting.check_once()
    assert cluster.units() == 2 * looks_before
    assert "r-watch" in store.counted()
    summary = ledger.last(PolicySummarised)
    assert summary is not None
    assert summary.payload["requests"] == {"treatment": 1, "control": 1}
    assert node.reader.collect().records == 0


def test_lost_counts_of_a_holdback_are_read_again(cluster: Cluster) -> None:
    """After its first decision, it is missing only if the database was lost."""
    cluster.promote()
    acting = cluster.controller()
    acting.check_once()
    cluster.write_and_count()
    cluster.store.forget("r-watch")
    cluster.node.restart()
    acting.check_once()
    cluster.node.reader.collect()
    assert cluster.units() == 2


@pytest.mark.parametrize("is_restarted", [False, True])
def test_all_rows_of_an_ended_watch_are_removed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, is_restarted: bool
) -> None:
    """In batches, one at each look, also by the next controller."""
    acting = cluster.controller()
    acting.check_once()
    cluster.promote()
    acting.check_once()
    cluster.write_and_count()
    cluster.ledger.append(
        AliasMoved(name="m", alias="champion", version=1, previous=2, reason=""), actor="ann"
    )
    monkeypatch.setattr(evidence_store, "BATCH", 1)
    assert cluster.units() == 2
    for left in (1, 0):
        acting.check_once()
        assert cluster.units() == left
        acting = cluster.controller() if is_restarted else acting
    acting.check_once()
    assert acting._ended == set()
