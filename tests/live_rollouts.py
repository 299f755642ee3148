"""`make live-rollouts`: the controller decides about real versions of the census model, while people are scored.

It prepares the data of the census in a folder of its own, and trains versions. Then clients score people of 2018
through the edge, and post each outcome right after the answer. No command promotes or rolls back: the controller does.
It prints each verdict with its reasons, and the exit code is 1 if one is not the expected one.

    ONLY=broken runs one scenario.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import polars as pl

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cluster.ledger.events import (
    PolicyDecided,
    PolicyEnded,
    QualityJudged,
    ScheduledRunDue,
    ScheduledRunStarted,
)
from tests.integration.conftest import Project, new_project
from tests.servers.polling import wait_until

LONGEST_S = 400.0
A_DAY = 900
"""Number of requests of a day that is monitored."""
SCHEDULE = """
trigger: {kind: drift, of: work}
command: jobs.train
parameters:
  name: work
  training_set: train.parquet
  label: employed
  model: lightgbm
  split: {modulo: 4, remainder: 3}
"""
CONNECTIONS, BATCH, PER_S = 8, 50, 250
PURPOSE = "employment_statistics"
END_OF_2018 = "2018-12-31T23:59:59Z"
YEARS = (2015, 2018)
"""Models are trained on people of the first year, and score people of the second one."""
DATA = (
    ("feature_jobs.census.source", "folder=data/census"),
    ("feature_jobs.apply",),
    *(
        ("feature_jobs.ingest", f"view={view}", f"source.path=data/census/{view}_{year}.parquet")
        for year in YEARS
        for view in ("person", "cohort")
    ),
    (
        *("feature_jobs.training_set", "service=employment", "entities=data/census/entities_2015.parquet"),
        "output=train.parquet",
    ),
    ("feature_jobs.materialize", "view=[person,cohort]", f"as_of={END_OF_2018}"),
)
"""Commands that prepare the data, as in `configs/pipeline/census.yaml`."""
TRAIN = (
    *("training_set=train.parquet", "label=employed", "model=lightgbm", "name=work"),
    *("split.modulo=4", "split.remainder=3"),
)
QUALITY = (
    *("rollout=canary", "rollout.bake_s=5", "rollout.deadline_s=3600"),
    "+rollout.steps=[{weight: 10}, {weight: 25}, {weight: 50}]",
    "rollout.event_guardrails=[{event: failure, limit: 0.1}]",
    *("rollout.traffic.units_per_hour=600000", "+rollout.traffic.outcome_delay_s=10"),
    "rollout.traffic.events={failure: 0.001}",
    "+rollout.traffic.metrics={brier: {mean: 0.13, deviation: 0.18}}",
    "+rollout.metrics=[{name: brier}]",
)
GOAL = "+rollout.goals=[{metric: brier, kind: superiority, expected: 0.03}]"
GUARDRAIL = "+rollout.metric_guardrails=[{metric: brier, margin: 0.01}]"


@dataclass
class Clients:
    """Context manager: scores people at a constant rate, and posts the outcome of each answer within a second.

    Args:
        project: The project.
        people: Key and true outcome of each person.
        outcome: Returns the outcome to post, for the true one and the variant that answered.
        as_of: Time of the requests.
    """

    project: Project
    people: list[tuple[int, int]]
    outcome: Callable[[int, str], int] = lambda truth, _: truth
    as_of: str = END_OF_2018
    statuses: list[int] = field(default_factory=list)

    def __enter__(self) -> Clients:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def wait_for_requests(self, number: int) -> None:
        """Wait until so many requests were answered."""
        wait_until(lambda: len(self.statuses) >= number, f"{number} requests", seconds=LONGEST_S)

    async def _run(self) -> None:
        context = ssl.create_default_context(cafile=str(self.project.storage_root / "tls" / "ca.pem"))
        connector = aiohttp.TCPConnector(ssl=context, limit=CONNECTIONS)
        headers = {"Authorization": f"Bearer {self.project.token(purpose=PURPOSE, ttl_s=7200)}"}
        people = self._people()
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            while not self._stopped.is_set():
                began = time.monotonic()
                batch = [next(people) for _ in range(BATCH)]
                answers = await asyncio.gather(*(self._predict(session, *one) for one in batch))
                await self._post(session, [one for one in answers if one is not None])
                await asyncio.sleep(max(0.0, BATCH / PER_S - (time.monotonic() - began)))

    def _people(self) -> Iterator[tuple[int, int]]:
        while True:
            yield from self.people

    async def _predict(self, session: aiohttp.ClientSession, key: int, truth: int) -> dict[str, Any] | None:
        body = {"entities": [{"person_id": key}], "as_of": self.as_of}
        url = f"{self.project.edge_url}/v1/models/work:predict"
        async with session.post(url, json=body, headers={"X-Unit-ID": str(key)}) as response:
            content = await response.json(content_type=None)
            self.statuses.append(response.status)
        if self.statuses[-1] != 200:
            return None
        posted = self.outcome(truth, content["variant"])
        return {"prediction_id": content["prediction_id"], "outcome": posted}

    async def _post(self, session: aiohttp.ClientSession, outcomes: list[dict[str, Any]]) -> None:
        if not outcomes:
            raise AssertionError(f"no person was scored; the last status is {self.statuses[-1]}")
        body = {"model": "work", "outcomes": outcomes}
        async with session.post(f"{self.project.edge_url}/v1/outcomes", json=body) as response:
            assert response.status == 200, await response.text()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rollout ended."""

    outcome: str
    reasons: list[str]
    steps: list[int]
    """Steps with a decision of their own, from 0."""
    seconds: float
    lost: int
    """Requests without an answer."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One rollout, and how it must end."""

    title: str
    champion: str
    """Name of the version that answers before."""
    treatment: str
    policy: tuple[str, ...]
    expected: str
    outcome: Callable[[int, str], int] = lambda truth, _: truth


def wrong_for_challenger(truth: int, variant: str) -> int:
    """Return an outcome that is random for the units of the challenger: the concept changed where it decides."""
    return random.randint(0, 1) if variant == "challenger" else truth


SCENARIOS = {
    "broken": Scenario(
        title="a version with permuted labels",
        champion="weak",
        treatment="broken",
        policy=(GUARDRAIL,),
        expected="rolled_back",
    ),
    "better": Scenario(
        title="a better version",
        champion="weak",
        treatment="good",
        policy=(GOAL, GUARDRAIL),
        expected="promoted",
    ),
    "concept": Scenario(
        title="the concept changes for one version",
        champion="weak",
        treatment="good",
        policy=(GUARDRAIL,),
        expected="rolled_back",
        outcome=wrong_for_challenger,
    ),
}
TRAINED = {
    "weak": ("model.rounds=6",),
    "good": (),
    "broken": ("label_permutation=true",),
}


def train(project: Project, *args: str) -> int:
    """Train a version of the model `work`, and return its number."""
    project.run("jobs.train", *TRAIN, "output=trained.json", *args, check=True)
    return int(json.loads((project.root / "trained.json").read_text())["version"])


def roll_out(project: Project, version: int, clients: Clients, *policy: str) -> Ended:
    """Start a rollout, score people until it has ended, and return how it ended.

    Raises:
        TimeoutError: It did not end.
    """
    ledger = project.ledger()
    before = ledger.head()
    start = ("action=start", "name=work", f"version={version}", *QUALITY, *policy)
    project.run("serve_apps.rollout", *start, check=True)
    began = time.monotonic()
    with clients:
        while not (ended := [one for one in ledger.entries(PolicyEnded) if one.seq > before]):
            if time.monotonic() - began > LONGEST_S:
                raise TimeoutError(
                    f"no end after {LONGEST_S:.0f} s; last decision: {ledger.last(PolicyDecided)}"
                )
            time.sleep(1)
        seconds = time.monotonic() - began
    decided = [one.payload for one in ledger.entries(PolicyDecided) if one.seq > before]
    return Ended(
        outcome=str(ended[0].payload["outcome"]),
        reasons=list(decided[-1]["reasons"]),
        steps=sorted({one["evidence"]["step"] for one in decided}),
        seconds=seconds,
        lost=sum(status != 200 for status in clients.statuses),
    )


def play(
    project: Project, scenario: Scenario, versions: dict[str, int], people: list[tuple[int, int]]
) -> bool:
    """Play one scenario, print how it ended, and return whether that is right."""
    clients = Clients(project, people, scenario.outcome)
    ended = roll_out(project, versions[scenario.treatment], clients, *scenario.policy)
    is_right = ended.outcome == scenario.expected and ended.lost == 0
    print(
        f"{'ok' if is_right else 'WRONG':6}{scenario.title}: {ended.outcome} after {ended.seconds:.0f} s, "
        f"{len(clients.statuses)} requests, {ended.lost} lost, decisions at steps {ended.steps}: "
        f"{'; '.join(ended.reasons)}",
        flush=True,
    )
    if ended.outcome == "promoted":
        project.run("serve_apps.rollout", "action=rollback", "name=work", "reason=next scenario", check=True)
    return is_right


def people_of(project: Project, condition: pl.Expr) -> list[tuple[int, int]]:
    """Return key and true outcome of the people of 2018 who meet a condition, in random order."""
    folder = project.root / "data" / "census"
    persons = pl.read_parquet(folder / "person_2018.parquet").filter(condition)
    table = pl.read_parquet(folder / "entities_2018.parquet").join(persons, on="person_id", how="semi")
    people = list(table.select("person_id", "employed").iter_rows())
    random.shuffle(people)
    return people


def score_days(project: Project, people: list[tuple[int, int]], days: range, *, flip: bool = False) -> None:
    """Score people on some days after 2018, and monitor the days.

    Args:
        project: The project.
        people: Key and true outcome of each person.
        days: The days of January 2019.
        flip: Whether the concept has changed, so that each outcome is the opposite.
    """
    for day in days:
        clients = Clients(
            project,
            people,
            lambda truth, _: 1 - truth if flip else truth,
            as_of=f"2019-01-{day:02}T12:00:00Z",
        )
        with clients:
            clients.wait_for_requests(A_DAY)
    project.run("jobs.monitor", "name=work", "period=day", "output=monitored.json", check=True)


def hold_on_drift(project: Project, version: int, people: list[tuple[int, int]]) -> bool:
    """Let only old people come during a rollout. Return whether the rollout holds."""
    ledger = project.ledger()
    start = ("action=start", "name=work", f"version={version}", *QUALITY, GOAL, "rollout.bake_s=900")
    project.run("serve_apps.rollout", *start, check=True)
    score_days(project, people, range(1, 4))

    def holds() -> bool:
        decided = ledger.last(PolicyDecided)
        return decided is not None and decided.payload["verdict"] == "hold"

    is_right = comes_true(holds)
    decided = ledger.last(PolicyDecided)
    print(
        f"{'ok' if is_right else 'WRONG':6}planted drift: {decided and decided.payload['reasons']}",
        flush=True,
    )
    project.run("serve_apps.rollout", "action=abort", "name=work", "reason=next scenario", check=True)
    return is_right


def retrain_when_all_are_worse(project: Project, version: int, people: list[tuple[int, int]]) -> bool:
    """Change the concept for both versions of a rollout. Return whether the model's own training starts."""
    ledger = project.ledger()
    start = ("action=start", "name=work", f"version={version}", "weight=50")
    project.run("serve_apps.rollout", *start, check=True)
    folder = project.root / "conf" / "schedule"
    folder.mkdir(parents=True)
    (folder / "again.yaml").write_text(SCHEDULE)
    project.run("jobs.schedule", "--config-dir", "conf", "action=apply", "schedule=again", check=True)
    score_days(project, people, range(4, 7), flip=True)
    is_right = comes_true(lambda: ledger.last(ScheduledRunStarted) is not None)
    judged, due = ledger.last(QualityJudged), ledger.last(ScheduledRunDue)
    is_right = is_right and judged is not None and judged.payload["verdict"] == "retrain"
    print(
        f"{'ok' if is_right else 'WRONG':6}concept of all versions: {judged and judged.payload}; "
        f"{due and due.payload['reason']}",
        flush=True,
    )
    return is_right


def comes_true(condition: Callable[[], bool]) -> bool:
    """Return whether something becomes true within a minute."""
    try:
        wait_until(condition, seconds=60)
    except AssertionError:
        return False
    return True


def main() -> int:
    """Prepare the data, train the versions, and play the scenarios."""
    chosen = os.environ.get("ONLY", ",".join((*SCENARIOS, "drift", "retrain"))).split(",")
    with tempfile.TemporaryDirectory(prefix="falaj-live-") as folder:
        project = new_project(Path(folder))
        project.up()
        try:
            for module, *args in DATA:
                project.run(module, *args, check=True)
            versions = {name: train(project, *args) for name, args in TRAINED.items()}
            project.run("serve_apps.deploy", "name=work", f"version={versions['weak']}", check=True)
            people = people_of(project, pl.lit(True))
            right = [play(project, SCENARIOS[name], versions, people) for name in chosen if name in SCENARIOS]
            if "drift" in chosen:
                old = people_of(project, pl.col("AGEP") > 60)
                right.append(hold_on_drift(project, versions["good"], old))
            if "retrain" in chosen:
                right.append(retrain_when_all_are_worse(project, versions["good"], people))
            export = project.root / "export.jsonl"
            project.run("cluster.ledger", "export", "--output", str(export), check=True)
            print(project.run("serve_apps.rollout.replay", "--file", str(export), check=True).stdout)
        finally:
            project.run("cluster.down", check=True)
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
