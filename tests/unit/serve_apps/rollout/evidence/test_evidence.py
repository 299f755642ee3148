"""From requests through a real HAProxy to the evidence of a rollout."""

from __future__ import annotations

import contextlib
import datetime as dt
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.records.edge_counts.refusals import read_refusals
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Traffic, plan
from cluster.statistics.policy import EventGuardrail, Policy, Step, UnitEvent
from serve_apps.rollout.assignment import Arm, assign, bounds
from serve_apps.rollout.evidence.access_files import Rotation
from serve_apps.rollout.evidence.collecting import Collector, Reader
from serve_apps.rollout.evidence.store import Counting, EvidenceStore
from tests.servers.edge import ROLLOUT, SALT, Echo, Edge, Mirror
from tests.servers.polling import wait_until
from tests.servers.ports import free_port

SLOW_MS = 400.0


class Behaving(Echo):
    """Answers with the status that the request asks for, after so many seconds."""

    def send_response(self, code: int, message: str | None = None) -> None:
        threading.Event().wait(float(self.headers.get("x-wait", 0)))
        super().send_response(int(self.headers.get("x-status", code)), message)
        self.send_header("content-type", "application/json")  # otherwise the edge replaces an error


def test_the_edge_imports_no_numpy() -> None:
    """Its reader needs neither the statistics nor Arrow, which take seconds and much memory."""
    program = "import sys, serve_apps.edge.__main__; print({'numpy', 'scipy', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def units(arm: Arm, number: int) -> list[str]:
    """Return the first units of an arm."""
    limits = bounds(ROLLOUT.weight)
    found = (str(unit) for unit in range(10_000) if assign(SALT, str(unit).encode(), limits) is arm)
    return [next(found) for _ in range(number)]


@pytest.fixture
def replica(whole: Edge) -> Iterator[Mirror]:
    with Mirror(Behaving) as mirror:
        whole.load_targets(whole.targets | {"m-v1": (mirror.address,), "m-v2": (mirror.address,)})
        yield mirror


def test_each_fate_of_a_request_is_counted_in_its_arm(replica: Mirror, whole: Edge, tmp_path: Path) -> None:
    """5xx, timeout and fallback are failures, a 4xx is a refusal, and a client that gives up is slow.

    Refusals by the edge and requests without a unit count in no arm. A unit counts once.
    """
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    store = EvidenceStore(ledger.engine)
    store.register(ROLLOUT.id, Counting(slow_ms=SLOW_MS))
    started_at = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    token = whole.token()
    treated, control = units(Arm.treatment, 12), units(Arm.control, 12)

    def ask(unit: str, **headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return whole.call(token=token, headers={"X-Unit-ID": unit} | named)[0]

    def give_up(unit: str) -> None:
        connection = whole.connect()
        headers = {"X-Unit-ID": unit, "x-wait": "2", "authorization": f"Bearer {token}"}
        connection.request("POST", "/v1/models/m:predict", b"{}", headers)
        threading.Event().wait(0.2)
        connection.close()

    for arm in (treated, control):
        for _ in range(2):
            assert ask(arm[0], x_status="500") == 500
            assert ask(arm[1], x_status="422") == 422
            assert ask(arm[2], x_wait="0.6") == 200
        give_up(arm[3])
        assert ask(arm[4]) == 200
    assert ask(treated[5], x_status="504") == 504
    assert ask("", x_status="500") == 500
    assert whole.call(token=token, headers={"X-Unit-ID": control[6]}, body=b"x" * 100)[0] == 200
    assert whole.call("/v1/models/other:predict", token=token, headers={"X-Unit-ID": control[7]})[0] == 404
    assert whole.call(headers={"X-Unit-ID": control[8]})[0] == 401
    dead = f"127.0.0.1:{free_port()}"
    whole.load_targets(whole.targets | {"m-v1": (replica.address,), "m-v2": (dead,)})
    wait_until(lambda: ask(treated[9]) == 200)
    wait_until(lambda: any(record["fallback"] == "1" for record in whole.records()))

    policy = Policy(
        steps=(Step(weight=20),),
        event_guardrails=(EventGuardrail(event=UnitEvent.failure, limit=0.2),),
        deadline_s=86_400,
    )
    the_plan = plan(policy, Traffic(units_per_hour=100_000, events={UnitEvent.failure: 0.01}))

    def evidence() -> Evidence:
        times = {"step_started_at": started_at, "started_at": started_at, "now": dt.datetime.now(dt.UTC)}
        return store.evidence(ROLLOUT.id, the_plan, step=0, **times)

    expected = {
        UnitEvent.failure: (3, 1),  # 500, 504 and the fallback; 500
        UnitEvent.refusal: (1, 1),
        UnitEvent.slow: (2, 2),
    }

    def counted() -> dict[UnitEvent, tuple[int, int]]:
        events = evidence().events
        return {event: (counts.treatment, counts.control) for event, counts in events.items()}

    reader = Reader(ledger.engine, Path(whole.places.root) / "access", edge="one", rotation=Rotation())
    with contextlib.closing(ledger), Collector(reader, interval_s=0.1).running():
        wait_until(lambda: counted() == expected)
        assert evidence().watched_units == 7
        assert store.requests(ROLLOUT.id)["none"] == 1
        assert sum(read_refusals(ledger.engine, "m").values()) == 4  # the four 422; 401 has no principal
