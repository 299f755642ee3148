"""Constant load on a project's edge during a test, and a check of the logs afterwards."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cluster.records.reading import read_predictions
from cluster.security.keys.access import key_store
from tests.clients.load import Answer, Load, percentile
from tests.integration.conftest import Project
from tests.projects import scoring
from tests.servers.polling import wait_until

CONNECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of all requests of a load."""

    answers: list[Answer]
    failed: list[Answer]
    """Answers with a status other than 200."""
    lost: set[str]
    """Prediction ids of answers without a row in the prediction log."""
    twice: set[str]
    """Prediction ids of answers with more than one row."""
    orphans: int
    """Number of rows in the prediction log without an answer.

    There is such a row if a replica was killed after it logged the prediction and before it answered. Another replica
    has answered the request.
    """
    unrecorded: set[str]
    """Prediction ids of answers without an access record."""

    def __str__(self) -> str:
        took = [answer.took_s for answer in self.answers]
        return (
            f"{len(self.answers)} requests, {len(self.failed)} failed, {len(self.lost)} lost, "
            f"{len(self.twice)} written twice, {self.orphans} orphans, {len(self.unrecorded)} without access record; "
            f"p50 {percentile(took, 50) * 1e3:.1f} ms, p99 {percentile(took, 99) * 1e3:.1f} ms, "
            f"longest {max(took) * 1e3:.0f} ms"
        )


class UnderLoad:
    """Context manager that sends requests during the `with` block, in total `per_s` per second."""

    def __init__(self, project: Project, *, per_s: float | None, connections: int = CONNECTIONS) -> None:
        self._project = project
        self._connections = connections
        self._token, self._minted_at = "", 0.0
        self._accounts = itertools.count()
        context = ssl.create_default_context(cafile=str(project.storage_root / "tls" / "ca.pem"))
        self._load = Load(
            url=f"{project.edge_url}{scoring.PREDICT}", requests=self._request, context=context, per_s=per_s
        )
        self._thread = threading.Thread(target=lambda: asyncio.run(self._load.run(connections=connections)))
        self._before: set[str] = set()

    def __enter__(self) -> UnderLoad:
        self._before = set(logged(self._project))
        self._thread.start()
        self.more(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._load.stopped = True
        self._thread.join()

    def more(self, count: int) -> None:
        """Wait until `count` more requests have been answered."""
        wanted = len(self._load.answers) + count
        self.until(lambda: len(self._load.answers) >= wanted)

    def until(self, said: Callable[[], bool], *, seconds: float = 60) -> None:
        """Wait, under load, until a condition is true."""
        wait_until(said, seconds=seconds)

    def outcome(self) -> Outcome:
        """Return the results of all requests. Call this after the `with` block."""
        answers = self._load.answers
        good = [answer for answer in answers if answer.status == 200]
        ids = {json.loads(answer.body)["prediction_id"] for answer in good}
        rows = Counter(one for one in logged(self._project) if one not in self._before)
        return Outcome(
            answers=answers,
            failed=[answer for answer in answers if answer.status != 200],
            lost=ids - rows.keys(),
            twice={one for one in ids if rows[one] > 1},
            orphans=len(rows.keys() - ids),
            unrecorded=self._unrecorded(ids),
        )

    def _request(self) -> tuple[dict[str, str], bytes]:
        if time.monotonic() - self._minted_at > 300:  # a token expires during a long load
            self._token, self._minted_at = self._project.token(), time.monotonic()
        account = next(self._accounts) % scoring.ACCOUNTS
        headers = {"authorization": f"Bearer {self._token}", "x-unit-id": str(account)}
        return headers, json.dumps({"entities": [{"account_id": account}]}).encode()

    def _unrecorded(self, ids: set[str]) -> set[str]:
        """Return the ids without an access record. This polls, because HAProxy writes records with a short delay."""
        deadline = time.monotonic() + 10
        while missing := ids - set(recorded(self._project.storage_root / "edge" / "access")):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return missing


def logged(project: Project) -> list[str]:
    """Return the prediction id of each row of the model's prediction log."""
    folder = project.storage_root / "predictions" / scoring.MODEL
    frame = read_predictions(folder, key_store(project.owner))
    return [] if frame.is_empty() else frame["prediction_id"].to_list()


def recorded(folder: Path) -> Iterable[str]:
    """Yield the prediction ids of all access records. The files also contain HAProxy's own notices."""
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            if line.startswith("{") and '"prediction_id"' in line:
                yield json.loads(line)["prediction_id"]
