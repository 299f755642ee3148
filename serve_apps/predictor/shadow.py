"""Shadow mode: another version gets copies of a share of the requests. Its answers are only logged.

The replica that answers a request also sends the copy: after its answer, in other threads, through a bounded queue. If
the shadow is slow or down, copies are dropped and counted, and no answer waits. The ledger says which version is the
shadow. Replicas read the ledger in the background. So while there is no shadow, a request needs only one more attribute
access.

A copy is sent directly to a replica of the shadow's application, with the sending replica's token, not with the
client's token. Of the client's headers, only those that the model reads are sent. The shadow logs the copy under the
same request id, with arm and variant `shadow`. If the shadow gives no answer, the sending replica logs the copy with
the reason (`failed_copy`), so that a failure of the shadow is evidence of a rollout. A dropped copy is not logged: it
says nothing about the shadow.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson
import xxhash
from ray.serve import metrics
from starlette.background import BackgroundTask
from starlette.responses import Response

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import LedgerEvent, ShadowStarted, ShadowStopped, Subject
from cluster.records.schema import COPY_FAILED, COPY_REFUSED, SHADOW, PredictionRecord
from serve_apps.predictor.inference_protocol import JSON_LENGTH
from serve_apps.predictor.paths import Operation
from serve_apps.predictor.shadow_replicas import Connections, FetchSchedule
from serve_apps.replica.edge_headers import EdgeHeaders
from serve_apps.replica.http import Unavailable
from serve_apps.replica.targets import Targets, addresses_of
from serve_apps.rollout.assignment import BUCKETS
from serve_apps.rollout.serving_state import Shadow, States, apply

LOG = logging.getLogger("falaj.serve")
LEDGER_INTERVAL_S = 1.0
SENDERS = 2
QUEUE_TIMEOUT_S = 1.0
MAX_WAITING, MAX_COPY_BYTES = 200, 128_000
"""Largest number of waiting copies, and largest size of one. Together they limit the memory of waiting copies."""


def copy_counter(tags: dict[str, str]) -> Callable[[str], None]:
    """Return a function that counts a copy by its result."""
    keys: Any = ("model", "version", "result")  # Ray's annotation allows only tuples of one element
    copies = metrics.Counter("falaj_shadow_copies", "requests for the shadow", tag_keys=keys)
    copies.set_default_tags(dict(tags))
    return lambda result: copies.inc(tags={"result": result})


def is_sampled(request_id: str, share: float) -> bool:
    """Return whether a request is in the share of `share` percent. A request without an id never is.

    The result depends only on the id and the share, so it is the same in every process.
    """
    return bool(request_id) and xxhash.xxh32_intdigest(request_id.encode()) % BUCKETS < share * BUCKETS / 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A copy of a request for the shadow."""

    operation: Operation
    edge: EdgeHeaders
    """The edge's headers, with arm and variant `shadow`."""
    json_length: str
    """Value of the request's header `JSON_LENGTH`; empty if the request does not have this header."""
    body: bytes
    answered_at: str
    """Time of the answer. It is the `as_of` of the shadow's feature read, however long the copy waits."""

    def path(self, model: str) -> str:
        """Return the path to send the copy to. If the client's path named a version, this path does not."""
        return (
            f"/v1/models/{model}:predict"
            if self.operation is Operation.predict
            else f"/v2/models/{model}/infer"
        )

    def content(self) -> bytes:
        """Return the body to send."""
        if self.operation is not Operation.predict:
            return self.body
        return orjson.dumps({"as_of": self.answered_at} | orjson.loads(self.body))


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """The shadow and its replicas."""

    shadow: Shadow
    addresses: tuple[str, ...]
    """Addresses of the shadow's replicas in Serve's last answer. There may be none."""


class Sent(NamedTuple):
    """What became of a copy."""

    result: str
    """`sent`, `refused`, `failed` or `dropped`."""
    fault: str = ""
    """Why the shadow gave no answer; "" if it gave one, or if it is not to blame."""
    version: int = 0


def failed_copy(copy: Copy, sent: Sent, *, model: str) -> PredictionRecord:
    """Return the record of a copy that the shadow did not answer."""
    return PredictionRecord(
        prediction_id=os.urandom(16).hex(),
        request_id=copy.edge.request_id,
        time=copy.answered_at,
        model=model,
        version=sent.version,
        variant=SHADOW,
        rollout=copy.edge.rollout,
        arm=SHADOW,
        unit_hash=copy.edge.unit_hash,
        as_of=copy.answered_at,
        entities=[],
        features={},
        predictions=[],
        fault=sent.fault,
    )


class Shadowing:
    """While a model has a shadow, sends copies of one replica's requests to the shadow.

    Args:
        model, version: the version that this replica serves. If it is the shadow itself, it sends no copies.
        ledger: ledger with the events that start and stop a shadow.
        fetch_targets: fetches the replicas' addresses of each application from Serve.
        token: returns this replica's own token.
        proof: the installation's secret. Without it, the shadow's replicas ignore the edge's headers.
        authority: file with the certificate of the nodes' authority.
        count: called with the result of each copy: `sent`, `refused`, `failed` or `dropped`.
        append: writes a record to this replica's log. It is called in the event loop of the requests.
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
        authority: str,
        count: Callable[[str], None],
        append: Callable[[PredictionRecord], None],
    ) -> None:
        self._model, self._version = model, version
        self._ledger = ledger
        self._fetch_targets = fetch_targets
        self._token = token
        self._proof = proof
        self._authority = authority
        self._count = count
        self._append = append
        self._loop: asyncio.AbstractEventLoop | None = None
        self._states: States = {}
        self._seq = 0
        self._destination: Destination | None = None
        self._app = ""
        self._schedule = FetchSchedule()
        self._is_failing = True
        """Whether copies fail, or the shadow's addresses are not known."""
        self._turn = itertools.count()
        self._waiting: queue.Queue[Copy] = queue.Queue(MAX_WAITING)
        self._ended = threading.Event()
        self._senders: list[threading.Thread] = []
        threading.Thread(target=self._watch, daemon=True, name="shadow").start()

    def add_copy(
        self,
        answer: Response,
        operation: Operation,
        edge: EdgeHeaders,
        body: bytes,
        *,
        json_length: str = "",
    ) -> Response:
        """Return the answer. If its request is in the share, the request's copy is sent after the answer."""
        destination = self._destination
        if destination is None or edge.arm == SHADOW:
            return answer
        if is_sampled(edge.request_id, destination.shadow.share):
            copy = Copy(
                operation=operation,
                edge=replace(edge, arm=SHADOW, variant=SHADOW, arrived=""),
                json_length=json_length,
                body=body,
                answered_at=dt.datetime.now(dt.UTC).isoformat(),
            )
            answer.background = BackgroundTask(self._enqueue, copy)
        return answer

    async def _enqueue(self, copy: Copy) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            if len(copy.body) > MAX_COPY_BYTES:
                raise queue.Full
            self._waiting.put_nowait(copy)
        except queue.Full:
            self._count("dropped")

    def close(self) -> None:
        """Stop sending copies."""
        self._ended.set()
        self._destination = None

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                self._update()
            except Exception as error:  # noqa: BLE001 (nothing would start this thread again)
                LOG.warning("The shadow's state cannot be read, so its last state stays: %s", error)
            self._ended.wait(LEDGER_INTERVAL_S)

    def _update(self) -> None:
        """Read the ledger to see which version is the shadow. If due, fetch the shadow's addresses from Serve."""
        self._read_ledger()
        state = self._states.get(self._model)
        shadow = state.shadow if state else None
        if self._ended.is_set() or shadow is None or shadow.version == self._version:
            self._destination, self._app = None, ""
            return
        if shadow.app != self._app:
            self._destination, self._app = None, shadow.app
            self._schedule, self._is_failing = FetchSchedule(), True
        if self._destination is not None:
            self._destination = replace(self._destination, shadow=shadow)
        self._start_senders()
        if self._schedule.is_due(failing=self._is_failing):
            self._is_failing = True  # until Serve has answered
            addresses = addresses_of(self._fetch_targets().get(shadow.app, ()))
            self._destination = Destination(shadow=shadow, addresses=addresses)
            self._is_failing = not addresses

    def _read_ledger(self) -> None:
        head = self._ledger.head()
        if head != self._seq:
            self._ledger.require_known(Subject.serving)
            newest = (self._newest_event(kind) for kind in (ShadowStarted, ShadowStopped))
            entries = sorted((entry for entry in newest if entry is not None), key=lambda entry: entry.seq)
            for entry in entries:
                self._states = apply(self._states, entry.event())
            self._seq = head

    def _newest_event(self, kind: type[LedgerEvent]) -> Entry | None:
        """Return the model's newest event of a kind. Earlier events of this kind have no effect any more."""
        return self._ledger.newest(kind, model=self._model)

    def _start_senders(self) -> None:
        self._senders = [sender for sender in self._senders if sender.is_alive()]
        while len(self._senders) < SENDERS:
            sender = threading.Thread(target=self._send_all, daemon=True, name="shadow copies")
            self._senders.append(sender)
            sender.start()

    def _send_all(self) -> None:
        with contextlib.closing(Connections(self._authority)) as connections:
            while not self._ended.is_set():
                destination = self._destination
                connections.close_others(destination.addresses if destination else ())
                try:
                    copy = self._waiting.get(timeout=QUEUE_TIMEOUT_S)
                except queue.Empty:
                    continue
                sent = self._send(copy, connections)
                self._count(sent.result)
                if sent.fault:
                    self._record(failed_copy(copy, sent, model=self._model))

    def _record(self, record: PredictionRecord) -> None:
        """Write a record in the event loop of the requests. It is lost if the replica ends."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._try_append, record)

    def _try_append(self, record: PredictionRecord) -> None:
        try:
            self._append(record)
        except Unavailable as error:  # the disk is full; then requests get 503, too
            LOG.debug("The record of a copy is lost: %s", error)

    def _send(self, copy: Copy, connections: Connections) -> Sent:
        """Send a copy and return what became of it."""
        destination = self._destination
        if destination is None or not destination.addresses:
            return Sent("dropped")
        address = destination.addresses[next(self._turn) % len(destination.addresses)]
        app, version = destination.shadow.app, destination.shadow.version
        fault = ""
        try:
            headers = copy.edge.to_headers(self._proof) | {"authorization": f"Bearer {self._token()}"}
            if copy.json_length:
                headers[JSON_LENGTH] = copy.json_length
            path = f"/{app}{copy.path(self._model)}"
            content, fault = copy.content(), COPY_FAILED
            status = connections.post(address, path, content, headers)
        except Exception as error:  # noqa: BLE001 (only this copy is lost; the next one may succeed)
            LOG.debug("A copy for %s at %s failed: %s", app, address, error)
            self._is_failing = True
            return Sent("failed", fault, version)
        if status == 200:
            return Sent("sent")
        return Sent("refused", COPY_REFUSED if 400 <= status < 500 else COPY_FAILED, version)
