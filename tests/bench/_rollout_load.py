"""Rollbacks under load, and what the controller of rollouts costs, without Ray: real HAProxy, ledger and controller.

Four processes: the two versions' servers, the edge with its controller and reader of access records, the controller
of rollouts, and the load with eight connections. The servers note when each request arrives. The time of a rollback is
that from just before its events are appended until the last request that the rolled back version has got.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent
from cluster.metrics import new_registry
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.settings import PlatformConfig, StorageConfig
from cluster.storage import Layout
from serve_apps.edge.control.waiting import wait_until_applied
from serve_apps.rollout import transitions
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.controller.leadership import Leadership
from serve_apps.rollout.controller.looking import look_until_stopped
from serve_apps.rollout.controller.metrics import ControllerMetrics
from serve_apps.rollout.evidence.access_files import Rotation
from serve_apps.rollout.evidence.collecting import Collector, Reader
from serve_apps.rollout.evidence.store import EvidenceStore
from serve_apps.rollout.history import read_history
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.outage.known import KnownRollouts
from serve_apps.rollout.outage.local_evidence import LocalEvidence
from serve_apps.rollout.outage.watch import OutageWatch
from serve_apps.rollout.policies import count_units
from serve_apps.rollout.serving_state import read_states
from tests.clients.load import Load
from tests.samples.journaled import new_journal
from tests.samples.policies import SPEC, WITH_POLICY, permitted
from tests.samples.rollouts import DEPLOYED, STARTED
from tests.servers.controller import Running, new_controller
from tests.servers.edge import PREDICT
from tests.servers.replica import served

ROLLBACKS, TURNS, TURN_S, CONNECTIONS, UNITS = 25, 6, 3.0, 8, 5_000
BEFORE_S, AFTER_S = 0.25, 0.3
SETTLE_S = 2.0
"""Pause before a turn. The reader counts the records of the turns without it meanwhile."""
CONTEXT = multiprocessing.get_context("spawn")
BAKING = replace(SPEC, bake_s=86_400.0, deadline_s=30 * 86_400.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What was measured with one database."""

    rollback_s: list[float]
    """Of running rollouts."""
    promoted_s: list[float]
    """Of promotions."""
    requests: int
    lost: int
    """Requests without an answer 200, or that no server has got."""
    ratios: list[float]
    """Requests per second with the controller, divided by those without, of each pair of turns."""
    requests_per_s: float


@dataclass(kw_only=True)
class Version:
    """A version's server. It answers each request, and notes when it arrived."""

    arrivals: list[float] = field(default_factory=list)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["method"] == "POST":
            self.arrivals.append(time.time())
            while (await receive()).get("more_body"):
                pass
        headers = [(b"content-length", b"2"), (b"x-falaj-prediction-id", b"p")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


def run_versions(pipe: Connection) -> None:
    """Serve both versions. Send their addresses, and at the end the arrivals of each."""
    versions = [Version(), Version()]
    with ExitStack() as stack:
        pipe.send([stack.enter_context(served(version)) for version in versions])
        pipe.recv()
        pipe.send([version.arrivals for version in versions])


def run_edge(root: Path, url: str, addresses: list[str], pipe: Connection, counting: Event) -> None:
    """Run an edge. While `counting` is set, it reads its access records."""
    with new_controller(root, ledger=Ledger(url)) as edge:
        edge.serve.targets = {"m-v1": (addresses[0],), "m-v2": (addresses[1],), "outcomes": (addresses[0],)}
        edge.thread.start()
        stopped = threading.Event()
        thread = threading.Thread(target=count, args=(edge, counting, stopped))
        thread.start()
        pipe.send(edge.settings.bind)
        pipe.recv()
        stopped.set()
        thread.join()


def count(edge: Running, counting: Event, stopped: threading.Event) -> None:
    """Run the edge's reader of access records while `counting` is set."""
    folder = edge.haproxy_file.with_name("access")
    while not stopped.is_set():
        if not counting.wait(0.1):
            continue
        reader = Reader(edge.ledger.engine, folder, edge="e", rotation=Rotation())
        with Collector(reader).running():
            while counting.is_set() and not stopped.wait(0.05):
                pass


def run_rollouts(root: Path, url: str, acting: Event, ended: Event) -> None:
    """Run the controller of rollouts while `acting` is set."""
    ledger = Ledger(url)
    controller = Controller(ledger, EvidenceStore(ledger.engine), refusal=permitted)
    watch = OutageWatch(new_journal(root), KnownRollouts(root / "known"), LocalEvidence(root / "access"))
    metrics = ControllerMetrics(new_registry())
    while not ended.is_set():
        if not acting.wait(0.1):
            continue
        stopped = threading.Event()
        leadership = Leadership(ledger.engine, root / "rollouts.lock")
        arguments = (controller, leadership, metrics, stopped, watch)
        loop = threading.Thread(target=look_until_stopped, args=arguments)
        loop.start()
        while acting.is_set() and not ended.wait(0.05):
            pass
        stopped.set()
        loop.join()


@dataclass(kw_only=True)
class World:
    """All processes, and the client's part."""

    config: PlatformConfig
    ledger: Ledger
    load: Load
    on: tuple[Event, Event]
    """Events that switch the reader and the controller on."""

    def append(self, *events: LedgerEvent) -> float:
        """Append events in one transaction, wait until the edge has applied them; return the time before."""
        began, since = time.time(), self.ledger.head()
        entries = transitions.append(self.ledger, "m", events, actor="bench", since=since)
        if entries is None:
            raise RuntimeError("another process changed the rollout")
        wait_until_applied(self.config, self.ledger, entries[-1].seq)
        return began

    def switch(self, on: bool) -> None:
        """Switch the reader and the controller on or off."""
        for event in self.on:
            event.set() if on else event.clear()


@contextlib.contextmanager
def process(target: Any, *arguments: Any) -> Iterator[Any]:
    """Run a function in a process of its own, and kill it if it does not end."""
    started = CONTEXT.Process(target=target, args=arguments)
    started.start()
    try:
        yield started
    finally:
        started.join(10)
        started.kill()


def measure_under_load(folder: Path, url: str) -> Figures:
    """Measure with one ledger database. The folder is that of the edge's files."""
    root = folder / "edge"
    root.mkdir(parents=True)
    ledger = Ledger(url)
    for event in DEPLOYED:
        ledger.append(event, actor="bench")
    versions, of_versions = CONTEXT.Pipe()
    edge, of_edge = CONTEXT.Pipe()
    counting, acting, ended = CONTEXT.Event(), CONTEXT.Event(), CONTEXT.Event()
    with process(run_versions, of_versions):
        addresses = versions.recv()
        with (
            process(run_edge, root, url, addresses, of_edge, counting),
            process(run_rollouts, root, url, acting, ended),
        ):
            bind = edge.recv()
            config = PlatformConfig(storage=StorageConfig(root=str(folder)))
            wait_until_applied(config, ledger, ledger.head(), app="m-v2")
            world = World(config=config, ledger=ledger, load=new_load(root, bind), on=(counting, acting))
            try:
                changes, ratios, per_s = asyncio.run(measure(world))
            finally:
                edge.send("end")
                versions.send("end")
                ended.set()
            arrivals = versions.recv()
    ledger.close()
    return figures(world, changes, ratios, per_s, arrivals)


def new_load(root: Path, bind: str) -> Load:
    """Return a load of many units."""
    places = Layout(str(root))
    token = mint_token(places, subject="t", role=Role.service, purpose="bench", ttl_s=3600)
    units = itertools.cycle(range(UNITS))
    context = ssl.create_default_context(cafile=f"{places.tls}/ca.pem")

    def request() -> tuple[dict[str, str], bytes]:
        return {"authorization": f"Bearer {token}", "x-unit-id": str(next(units))}, b"{}"

    return Load(url=f"https://{bind}{PREDICT}", requests=request, context=context)


Changes = dict[str, list[tuple[float, float]]]
"""By kind of rollback: when its events were about to be appended, and when the next change began."""


async def measure(world: World) -> tuple[Changes, list[float], float]:
    """Send requests, roll back again and again, then compare turns with and without the controller."""
    running = asyncio.create_task(world.load.run(connections=CONNECTIONS))
    world.switch(True)
    changes: Changes = {"rollback": [], "promoted": []}
    for number in range(ROLLBACKS):
        for kind in changes:
            changes[kind].append(await asyncio.to_thread(roll_back, world, kind, f"{kind[0]}{number}"))
    await asyncio.to_thread(start_baking, world)
    turns: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * TURNS):
        on = number % 4 in (0, 3)  # on, off, off, on: so a drift does not favour one side
        world.switch(on)
        await asyncio.sleep(SETTLE_S)
        before, began = len(world.load.answers), time.monotonic()
        await asyncio.sleep(TURN_S)
        turns[on].append((len(world.load.answers) - before) / (time.monotonic() - began))
    world.load.stopped = True
    await running
    ratios = [one / other for one, other in zip(turns[True], turns[False], strict=True)]
    return changes, ratios, float(np.median(turns[True]))


def ending(world: World) -> transitions.Ending:
    """Return the running rollout, which ends."""
    rollout = read_states(world.ledger)["m"].rollout
    assert rollout is not None
    return transitions.Ending(model="m", rollout=rollout, run=None, reason="bench")


def roll_back(world: World, kind: str, rollout: str) -> tuple[float, float]:
    """Start a rollout with half of the units, promote it if that is measured, and roll back."""
    started = replace(STARTED, rollout=rollout, salt=rollout, weight=50)
    world.append(started)
    if kind == "promoted":
        world.append(*transitions.promotion(ending(world), champion=1))
    time.sleep(BEFORE_S)
    history = read_history(world.ledger, "m")
    if history.promotion is not None and history.promotion.rollout == rollout:
        events = transitions.rollback_of_promotion("m", history, history.promotion, reason="bench")
    else:
        events = transitions.rollback(ending(world))
    at = world.append(*events)
    time.sleep(AFTER_S)
    return at, time.time()


def start_baking(world: World) -> None:
    """Start a rollout that the controller judges each second, and that stays at its first step."""
    count_units(EvidenceStore(world.ledger.engine), "b", BAKING)
    policy = replace(
        WITH_POLICY, rollout="b", plan=as_json(BAKING.plan()), traffic=as_json(BAKING.expected_traffic())
    )
    world.append(replace(STARTED, rollout="b", salt="b"), policy)


def figures(
    world: World, changes: Changes, ratios: list[float], per_s: float, arrivals: list[list[float]]
) -> Figures:
    """Return the figures of a measurement."""
    challenger = np.array(arrivals[1])
    taken = {
        kind: [last_request(challenger, at, until) - at for at, until in spans]
        for kind, spans in changes.items()
    }
    failed = sum(answer.status != 200 for answer in world.load.answers)
    requests = len(world.load.answers)
    return Figures(
        rollback_s=taken["rollback"],
        promoted_s=taken["promoted"],
        requests=requests,
        lost=failed + max(0, requests - failed - sum(map(len, arrivals))),
        ratios=ratios,
        requests_per_s=per_s,
    )


def last_request(arrivals: np.ndarray[Any, Any], at: float, until: float) -> float:
    """Return the time of the last arrival between two times, or the first time if there was none."""
    between = arrivals[(arrivals >= at) & (arrivals < until)]
    return float(between.max(initial=at))
