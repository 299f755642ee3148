"""Shadow mode: another version sees a share of the requests, and nobody sees its answers but the log.

The replica that answered sends a copy when its answer has left, from threads of its own, over a queue that is bounded:
where the shadow is slow or down, copies are dropped and counted, and no answer waits. The ledger says which version is
the shadow; replicas look at its head in the background, so that a request costs one attribute while there is none.

A copy goes straight to a replica of the shadow's application as the service that this replica is: the client's token
and all its headers but those that the model reads stay here. The shadow logs under the same request id, arm and variant
`shadow`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import orjson
import xxhash
from ray.serve import metrics
from starlette.background import BackgroundTask
from starlette.responses import Response

from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent, ShadowStarted, ShadowStopped, Subject
from cluster.records import SHADOW
from serve_apps.predictor.inference_protocol import JSON_LENGTH
from serve_apps.predictor.paths import Operation
from serve_apps.predictor.shadow_replicas import Connections, Pace
from serve_apps.replica.edge_headers import EdgeHeaders
from serve_apps.replica.targets import Targets, addresses_of
from serve_apps.rollout.assignment import BUCKETS
from serve_apps.rollout.state import Shadow, States, apply

LOG = logging.getLogger("falaj.serve")
LEDGER_INTERVAL_S = 1.0
SENDERS = 2
MAX_WAITING, MAX_COPY_BYTES = 200, 128_000
"""Together they bound the memory of copies that wait."""


def copy_counter(tags: dict[str, str]) -> Callable[[str], None]:
    """Counts copies by what became of them."""
    keys: Any = ("model", "version", "result")  # Ray annotates a tuple of one
    copies = metrics.Counter("falaj_shadow_copies", "requests for the shadow", tag_keys=keys)
    copies.set_default_tags(dict(tags))
    return lambda result: copies.inc(tags={"result": result})


def is_sampled(request_id: str, share: float) -> bool:
    """Whether a request is among the share, in percent: the same for whoever asks; one without an id never is."""
    return bool(request_id) and xxhash.xxh32_intdigest(request_id.encode()) % BUCKETS < share * BUCKETS / 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A request to be sent again."""

    operation: Operation
    edge: EdgeHeaders
    """What the edge said of the request, but that it is the shadow's now."""
    json_length: str
    """The header `JSON_LENGTH`; empty where the request had none."""
    body: bytes
    moment: str
    """At which it was answered: features are read as of then, however long the copy waits."""

    def path(self, model: str) -> str:
        """That it is sent to, whatever version the client named."""
        return (
            f"/v1/models/{model}:predict"
            if self.operation is Operation.predict
            else f"/v2/models/{model}/infer"
        )

    def content(self) -> bytes:
        """The body that is sent."""
        if self.operation is not Operation.predict:
            return self.body
        return orjson.dumps({"as_of": self.moment} | orjson.loads(self.body))


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """Where copies go."""

    shadow: Shadow
    addresses: tuple[str, ...]
    """Of its replicas, as Serve last named them; empty where there was none."""


class Shadowing:
    """Copies one replica's requests to the shadow of its model, while there is one.

    Args:
        model, version: that this replica serves; a shadow copies nothing to itself.
        ledger: says which version is the shadow.
        fetch_targets: asks Serve for the replicas' addresses of each application.
        token: this service's own.
        proof: the installation's secret, without which the shadow's replicas believe no header.
        count: is told what became of each copy: `sent`, `refused`, `failed` or `dropped`.
    """

    def __init__(
        self,
        *,
        model: str,
        version: int,
        ledger: Ledger,
        fetch_targets: Callable[[], Targets],
        token: Callable[[], str],
        proof: str,
        count: Callable[[str], None],
    ) -> None:
        self._model, self._version = model, version
        self._ledger = ledger
        self._fetch_targets = fetch_targets
        self._token = token
        self._proof = proof
        self._count = count
        self._states: States = {}
        self._seq = 0
        self._to: Destination | None = None
        self._app = ""
        self._pace = Pace()
        self._is_failing = True
        """Copies do not arrive, or nobody knows where to."""
        self._turn = itertools.count()
        self._waiting: queue.Queue[Copy] = queue.Queue(MAX_WAITING)
        self._ended = threading.Event()
        self._senders: list[threading.Thread] = []
        threading.Thread(target=self._follow_all, daemon=True, name="shadow").start()

    def follow(
        self,
        answer: Response,
        operation: Operation,
        edge: EdgeHeaders,
        body: bytes,
        *,
        json_length: str = "",
    ) -> Response:
        """The answer, with a copy of its request behind it if it is one of the share."""
        to = self._to
        if to is None or edge.arm == SHADOW:
            return answer
        if is_sampled(edge.request_id, to.shadow.share):
            copy = Copy(
                operation=operation,
                edge=replace(edge, arm=SHADOW, variant=SHADOW, arrived=""),
                json_length=json_length,
                body=body,
                moment=dt.datetime.now(dt.UTC).isoformat(),
            )
            answer.background = BackgroundTask(self._offer, copy)
        return answer

    async def _offer(self, copy: Copy) -> None:
        try:
            if len(copy.body) > MAX_COPY_BYTES:
                raise queue.Full
            self._waiting.put_nowait(copy)
        except queue.Full:
            self._count("dropped")

    def close(self) -> None:
        """Send no more."""
        self._ended.set()
        self._to = None

    def _follow_all(self) -> None:
        while not self._ended.is_set():
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 (nobody starts this thread again)
                LOG.warning(
                    "What is to be known of the shadow cannot be read, so the last of it stays: %s", error
                )
            self._ended.wait(LEDGER_INTERVAL_S)

    def _look(self) -> None:
        """Take up what the ledger and Serve say."""
        self._follow_ledger()
        state = self._states.get(self._model)
        shadow = state.shadow if state else None
        if self._ended.is_set() or shadow is None or shadow.version == self._version:
            self._to, self._app = None, ""
            return
        if shadow.app != self._app:
            self._to, self._app, self._pace, self._is_failing = None, shadow.app, Pace(), True
        if self._to is not None:
            self._to = replace(self._to, shadow=shadow)
        self._start_senders()
        if self._pace.is_due(failing=self._is_failing):
            self._is_failing = True  # until Serve has answered
            addresses = addresses_of(self._fetch_targets().get(shadow.app, ()))
            self._to, self._is_failing = Destination(shadow=shadow, addresses=addresses), not addresses

    def _follow_ledger(self) -> None:
        head = self._ledger.head()
        if head != self._seq:
            self._ledger.require_known(Subject.serving)
            news = [*self._news(ShadowStarted), *self._news(ShadowStopped)]
            for _, event in sorted(news, key=lambda one: one[0]):
                self._states = apply(self._states, event)
            self._seq = head

    def _news(self, kind: type[LedgerEvent]) -> list[tuple[int, LedgerEvent]]:
        entries = self._ledger.entries(kind, after=self._seq)
        return [(entry.seq, entry.event()) for entry in entries if entry.payload["model"] == self._model]

    def _start_senders(self) -> None:
        self._senders = [sender for sender in self._senders if sender.is_alive()]
        while len(self._senders) < SENDERS:
            sender = threading.Thread(target=self._send_all, daemon=True, name="shadow copies")
            self._senders.append(sender)
            sender.start()

    def _send_all(self) -> None:
        with contextlib.closing(Connections()) as connections:
            while not self._ended.is_set():
                to = self._to
                connections.keep(to.addresses if to else ())
                try:
                    copy = self._waiting.get(timeout=1.0)
                except queue.Empty:
                    continue
                self._count(self._sent(copy, connections))

    def _sent(self, copy: Copy, connections: Connections) -> str:
        """What became of a copy."""
        to = self._to
        if to is None or not to.addresses:
            return "dropped"
        address = to.addresses[next(self._turn) % len(to.addresses)]
        try:
            headers = copy.edge.sent(self._proof) | {"authorization": f"Bearer {self._token()}"}
            if copy.json_length:
                headers[JSON_LENGTH] = copy.json_length
            path = f"/{to.shadow.app}{copy.path(self._model)}"
            status = connections.post(address, path, copy.content(), headers)
        except Exception as error:  # noqa: BLE001 (a copy is lost, whatever the reason; the next may arrive)
            LOG.debug("A copy for %s at %s failed: %s", to.shadow.app, address, error)
            self._is_failing = True
            return "failed"
        return "sent" if status == 200 else "refused"
