"""Falaj on three nodes, for the tests of failures."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.clients.balanced_load import BalancedLoad, Kind, Sent
from tests.nodes import workload
from tests.nodes.computers import Computer
from tests.nodes.three_nodes import ThreeNodes
from tests.projects import scoring

TOKEN_S = 850
HEALTH_PATH = "/v2/health/ready"
TRIES = 60


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Numbers of acknowledged predictions and pushes that are lost."""

    records: int
    """Answers without exactly one row in the prediction log."""
    pushes: int
    """Pushes that are not in the push log, or whose accounts have an older value online."""


@dataclass(kw_only=True)
class Falaj:
    """The cluster, its workload, and what it must not lose."""

    cluster: ThreeNodes
    predict_per_s: float
    push_per_s: float
    run: str = field(default_factory=lambda: os.urandom(4).hex())
    _next: int = 0
    """Number of the next push. It grows over all loads of a run, so a later push has the greater value."""
    _pushed: dict[int, int] = field(default_factory=dict)
    """Greatest acknowledged value by account."""

    @property
    def per_s(self) -> float:
        return self.predict_per_s + self.push_per_s

    def entry(self, computer: Computer) -> list[psutil.Process]:
        return [one for one in computer.members() if one.name() == "haproxy"]

    def start_head(self) -> None:
        self.cluster.up()

    def start_node(self, computer: Computer) -> None:
        self.cluster.join(computer)

    def drain(self, computer: Computer) -> None:
        computer.run("cluster.leave", "deadline_s=60")

    def disk(self, computer: Computer) -> Path:
        return computer.storage_root

    def load(self) -> BalancedLoad:
        """Return a load on all edges: predictions with features, and pushes."""
        token = self.cluster.token(ttl_s=TOKEN_S)
        first, at = self._next, dt.datetime.now(dt.UTC).isoformat()
        kinds = {
            "predict": Kind(path=scoring.PREDICT, per_s=self.predict_per_s, body=workload.predict_body),
            "push": Kind(
                path=workload.PUSH,
                per_s=self.push_per_s,
                body=lambda number: workload.push_body(first + number, run=self.run, at=at),
            ),
        }
        return BalancedLoad(
            servers=self.cluster.edges,
            health_path=HEALTH_PATH,
            kinds=kinds,
            headers=lambda number: {"Authorization": f"Bearer {token}", "X-Unit-ID": str(number)},
            authority=self.cluster.certificate_authority,
        )

    def lost(self, sent: Collection[Sent]) -> Lost:
        """Compare the answers of one load with the logs and with the online store."""
        good = [one for one in sent if one.is_good]
        ids = [one.content["prediction_id"] for one in good if one.kind == "predict"]
        rows: dict[str, int] = {}
        for one in workload.logged_ids(self.cluster):
            rows[one] = rows.get(one, 0) + 1
        first = self._next
        pushed = sorted(first + one.number for one in good if one.kind == "push")
        self._next += 1 + max((one.number for one in sent if one.kind == "push"), default=-1)
        stored = workload.stored_pushes(self.cluster)
        missing = {one for one in pushed if workload.key_hash(f"{self.run}-{one}") not in stored}
        self._pushed |= {one % scoring.ACCOUNTS: one for one in pushed}
        online = self.online([one % scoring.ACCOUNTS for one in pushed])
        newest = {account: -1 if number is None else number for account, number in online.items()}
        old = {one for one in pushed if newest[one % scoring.ACCOUNTS] < one}
        return Lost(
            records=sum(rows.get(one, 0) != 1 for one in ids),
            pushes=len(missing | old),
        )

    def online(self, accounts: list[int]) -> dict[int, int | None]:
        """Return the newest pushed number of accounts, read at the first edge that answers."""
        found: dict[int, int | None] = {}
        distinct = sorted(set(accounts))
        for start in range(0, len(distinct), 100):
            chunk = distinct[start : start + 100]
            entities = [{"account_id": one} for one in chunk]
            content = self._read({"service": workload.RECENT, "entities": entities})
            found |= dict(zip(chunk, workload.numbers_of(content), strict=True))
        return found

    def _read(self, body: dict[str, Any]) -> dict[str, Any]:
        for _ in range(TRIES):
            for url in self.cluster.edges.values():
                status, content = workload.post(
                    f"{url}{workload.READ}",
                    body,
                    token=self.cluster.token(),
                    authority=self.cluster.certificate_authority,
                )
                if status == 200:
                    return content
            time.sleep(1)
        raise AssertionError("no edge answers")
