"""A rollout with a policy at a real HAProxy: its access records are counted, judged, and acted on."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.ledger.events import PolicyDecided, PolicyEnded, PolicyStarted
from cluster.metrics import new_registry
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.settings import PlatformConfig, StorageConfig
from cluster.statistics.policy import REQUEST_EVENTS
from serve_apps.rollout.assignment import HOLDBACK_WEIGHT, Arm, assign, bounds
from serve_apps.rollout.controller import looking
from serve_apps.rollout.controller.leadership import Leadership
from serve_apps.rollout.controller.metrics import ControllerMetrics
from serve_apps.rollout.controller.service import new_controller
from serve_apps.rollout.evidence.access_files import Rotation
from serve_apps.rollout.evidence.collecting import Collector, Reader
from serve_apps.rollout.evidence.store import EvidenceStore
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.outage.known import KnownRollouts
from serve_apps.rollout.outage.local_evidence import LocalEvidence
from serve_apps.rollout.outage.watch import OutageWatch
from serve_apps.rollout.policies import count_units
from serve_apps.rollout.policy.sections import EventGuardrailSpec, StepSpec, TrafficSpec
from serve_apps.rollout.policy.spec import RolloutSpec
from tests.samples.model_versions import registered
from tests.samples.policies import WITH_POLICY
from tests.samples.rollouts import DEPLOYED, STARTED
from tests.servers.controller import CHAMPION_ONLY, Running
from tests.servers.controller import new_controller as new_edge_controller
from tests.servers.edge import PREDICT, Echo, Mirror

DEADLINE_S = 60.0
HELD = "m-v2|m-v1|predecessor|r-watch|s|100|9900"
COMPARED = (Arm.treatment, Arm.control)
SPEC = RolloutSpec(
    steps=[StepSpec(weight=weight) for weight in (20, 50)],
    event_guardrails=[EventGuardrailSpec(event=event, limit=0.4) for event in REQUEST_EVENTS],
    slow_ms=2000,
    holdback=True,
    traffic=TrafficSpec(units_per_hour=20_000, events=dict.fromkeys(map(str, REQUEST_EVENTS), 0.01)),
)
POLICY: PolicyStarted = replace(
    WITH_POLICY, plan=as_json(SPEC.plan()), traffic=as_json(SPEC.expected_traffic()), slow_ms=SPEC.slow_ms
)


class Broken(Echo):
    """Answers every request with 500."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(500)
        self.send_header("content-length", "0")
        self.end_headers()


class Breaking(Broken):
    """Answers well until `breaks` is set."""

    breaks = threading.Event()

    def do_POST(self) -> None:
        (super().do_POST if self.breaks.is_set() else Echo.do_POST.__get__(self))()


class Refusing(Echo):
    """Refuses every request."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(400)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


@contextlib.contextmanager
def rollout(root: Path, handler: type[Echo]) -> Iterator[Running]:
    """Run an edge with two versions, a collector, and the controller's loop. The rollout follows the policy."""
    config = PlatformConfig(storage=StorageConfig(root=str(root)))
    with contextlib.ExitStack() as stack:
        champion, treatment = (stack.enter_context(Mirror(kind)) for kind in (Echo, handler))
        edge = stack.enter_context(new_edge_controller(root))
        edge.serve.targets = {
            "m-v1": (champion.address,),
            "m-v2": (treatment.address,),
            "outcomes": (champion.address,),
        }
        edge.thread.start()
        edge.tell_and_wait(*DEPLOYED, STARTED)
        reader = Reader(edge.ledger.engine, root / "access", edge="e", rotation=Rotation())
        stack.enter_context(Collector(reader, interval_s=0.1).running())
        store = EvidenceStore(edge.ledger.engine)
        count_units(store, STARTED.rollout, SPEC)
        edge.tell(registered("m", 2), POLICY)
        stopped = threading.Event()
        loop = threading.Thread(
            target=looking.look_until_stopped,
            args=(
                new_controller(config, edge.ledger, store),
                Leadership(edge.ledger.engine, root / "rollouts.lock"),
                ControllerMetrics(new_registry()),
                stopped,
                OutageWatch(edge.journal, KnownRollouts(root / "known"), LocalEvidence(root / "access")),
            ),
        )
        loop.start()
        try:
            yield edge
        finally:
            stopped.set()
            loop.join()


def send_until(
    edge: Running, is_over: Callable[[], bool], *, at_least: int = 0, units: Sequence[int] = ()
) -> Counter[int]:
    """Send requests of different units, or again and again of these, until something is over. Count the statuses."""
    token = mint_token(edge.places, subject="t", role=Role.service, purpose="test", ttl_s=900)
    statuses: Counter[int] = Counter()
    deadline = time.monotonic() + DEADLINE_S
    connection = edge.connect()
    for number, unit in enumerate(itertools.cycle(units) if units else itertools.count()):
        headers = {"authorization": f"Bearer {token}", "x-unit-id": str(unit)}
        connection.request("POST", PREDICT, b"{}", headers)
        response = connection.getresponse()
        response.read()
        statuses[response.status] += 1
        if number >= at_least and number % 20 == 0 and is_over():
            break
        assert time.monotonic() < deadline, [entry.payload for entry in edge.ledger.entries(PolicyDecided)][
            -1
        ]
    connection.close()
    return statuses


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "EVERY_S", 0.1)


def ended(edge: Running) -> dict[str, object]:
    entry = edge.ledger.last(PolicyEnded)
    assert entry is not None
    return entry.payload


def test_healthy_version_is_promoted_and_taken_back_when_it_breaks(tmp_path: Path) -> None:
    """By itself, and no request fails until it breaks. The holdback's units show the harm."""
    with rollout(tmp_path / "edge", Breaking) as edge:
        statuses = send_until(edge, lambda: edge.split() == HELD)
        assert (ended(edge)["outcome"], ended(edge)["weight"]) == ("promoted", 50)
        assert set(statuses) == {200}
        limits = bounds(HOLDBACK_WEIGHT)
        units = [unit for unit in range(9000) if assign("s", str(unit).encode(), limits) in COMPARED]
        Breaking.breaks.set()
        send_until(edge, lambda: edge.split() == CHAMPION_ONLY, units=units)
        assert set(send_until(edge, lambda: True, at_least=50)) == {200}


@pytest.mark.parametrize(("handler", "reason"), [(Broken, "failure: "), (Refusing, "refusal: ")])
def test_harmful_version_is_rolled_back(tmp_path: Path, handler: type[Echo], reason: str) -> None:
    """The edge sends it no request afterwards."""
    with rollout(tmp_path / "edge", handler) as edge:
        send_until(edge, lambda: edge.split() == CHAMPION_ONLY)
        assert set(send_until(edge, lambda: True, at_least=50)) == {200}
        assert ended(edge)["outcome"] == "rolled_back"
        assert reason in str(ended(edge)["reason"])
