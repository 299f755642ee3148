"""A real replica behind a real HTTP server, without Ray, with encrypted model files, key broker, tokens and log."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import polars as pl
import uvicorn
from onnx import TensorProto, helper, numpy_helper
from starlette.requests import Request
from starlette.responses import Response

from cluster.ledger import Ledger, open_ledger
from cluster.records.location import prediction_log
from cluster.records.reading import read_predictions
from cluster.registry import Lineage, ModelVersion, Registry
from cluster.runtime.signature import ONNX_FILE, ONNX_INPUT, ONNX_OUTPUT, SIGNATURE_FILE, ModelSignature, Task
from cluster.security.edge_proof import edge_proof
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord, write_record
from cluster.settings import (
    BatchingConfig,
    Durability,
    LedgerConfig,
    OnlineConfig,
    PlatformConfig,
    ReplicaConfig,
    StorageConfig,
)
from cluster.settings_conversion import to_plain
from cluster.storage import Layout, layout
from feature_jobs.store import FeatureService
from feature_jobs.store.catalog.log_keys import outcome_key
from feature_jobs.store.catalog.protection import view_keys
from feature_jobs.store.catalog.specifications import Definitions, apply
from serve_apps.features.features import Features
from serve_apps.outcomes.outcomes import Outcomes
from serve_apps.predictor.predictor import Predictor
from serve_apps.replica.edge_headers import EdgeHeaders
from tests.projects.push import INCOME
from tests.servers.key_broker import running_broker
from tests.servers.polling import wait_until

MODEL = "m"


def write_model(folder: Path, signature: ModelSignature) -> None:
    """Write the files of a linear model. Its score is the sum of the inputs; a missing input counts as 0."""
    width, outputs = signature.width, signature.num_scores
    weights = np.tile(np.linspace(0.01, 0.02, outputs, dtype=np.float32), (width, 1))
    known = {"zero": np.float32(0), "weights": weights, "last": np.array([1], dtype=np.int64)}
    end = {Task.binary: "Sigmoid", Task.multiclass: "Softmax", Task.regression: "Identity"}[signature.task]
    flat = signature.task is not Task.multiclass
    nodes = [
        helper.make_node("IsNaN", [ONNX_INPUT], ["missing"]),
        helper.make_node("Where", ["missing", "zero", ONNX_INPUT], ["present"]),
        helper.make_node("MatMul", ["present", "weights"], ["sums"]),
        helper.make_node(end, ["sums"], ["column" if flat else ONNX_OUTPUT]),
        *([helper.make_node("Squeeze", ["column", "last"], [ONNX_OUTPUT])] if flat else []),
    ]
    graph = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info(ONNX_INPUT, TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info(ONNX_OUTPUT, TensorProto.FLOAT, ["n"] if flat else ["n", outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in known.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    folder.mkdir(parents=True)
    (folder / ONNX_FILE).write_bytes(onnx.ModelProto.SerializeToString(model))
    (folder / SIGNATURE_FILE).write_text(signature.to_json())


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A running replica, and methods that send requests to it."""

    address: str
    outcomes: str
    """Address of the application `outcomes`."""
    places: Layout
    keys: KeyAccess
    prefix: str
    predictor: Predictor
    ledger: Ledger
    failures: list[Exception] = field(default_factory=list)
    """Errors that the application raised instead of answering. There must be none."""

    def token(self, role: Role = Role.service, scope: str = "") -> str:
        return mint_token(self.places, subject="t", role=role, purpose="test", ttl_s=900, scope=scope)

    def as_edge(self, **said: str) -> dict[str, str]:
        """Return the headers that the edge would send."""
        return EdgeHeaders(**said).to_headers(edge_proof(self.places))

    @property
    def at_outcomes(self) -> Replica:
        """Return a client of the application `outcomes`."""
        return replace(self, address=self.outcomes, prefix="/outcomes")

    def register(self, signature: ModelSignature) -> ModelVersion:
        """Register another version of the model."""
        root = Path(self.places.root)
        config = PlatformConfig(storage=StorageConfig(root=str(root)))
        return register(Path(tempfile.mkdtemp(dir=root)), config, signature, self.keys)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=10)

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        token: str | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request, and return status, headers and body. A body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"authorization": f"Bearer {token or self.token()}"} | (headers or {})
        connection = self.connect()
        connection.request(method or ("GET" if data is None else "POST"), self.prefix + path, data, given)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, answer

    def json(self, path: str, body: Any = None, **more: Any) -> tuple[int, dict[str, Any]]:
        """Send one request, and return status and JSON."""
        status, _, answer = self.call(path, body, **more)
        return status, json.loads(answer)

    def log(self) -> pl.DataFrame:
        """Return the prediction log."""
        return read_predictions(prediction_log(self.places, self.ledger, MODEL), key_store(self.keys))


class SharedState(NamedTuple):
    """State that several nodes share."""

    root: str
    """Remote storage root."""
    ledger_url: str

    def storage(self, local: Path) -> StorageConfig:
        """Return the configuration of a node whose own state is in a local folder."""
        return StorageConfig(root=self.root, local=str(local))


@contextlib.contextmanager
def running_replica(
    root: Path,
    signature: ModelSignature,
    *,
    write: Callable[[Path, ModelSignature], None] = write_model,
    before: Callable[[Layout, KeyAccess], None] | None = None,
    durability: Durability = Durability.process,
    batching: BatchingConfig | None = None,
    shared: SharedState | None = None,
) -> Iterator[Replica]:
    """Run a replica of version 1 of a model.

    Args:
        root: The storage root. It may be that of an edge.
        signature: Signature of the model.
        write: Writes the model's files.
        before: Called before the replica starts, for example to put features online.
        durability: Durability of the log.
        batching: Batching of requests. None means the default.
        shared: Remote storage root and ledger. None means that all state is in `root`.
    """
    options = ReplicaConfig(durability=durability, batching=batching or BatchingConfig())
    storage = StorageConfig(root=str(root)) if shared is None else shared.storage(root)
    ledger = LedgerConfig(url=None if shared is None else shared.ledger_url)
    config = PlatformConfig(storage=storage, ledger=ledger, replica=options)
    places = layout(config.storage)
    ensure_issuer(places)
    names = (f"predictions/{MODEL}/sensitive", outcome_key(MODEL))
    with running_broker(*names) as keys, listener() as port:
        write_record(record(root, keys.socket, port, storage), config.storage)
        version = register(root, config, signature, keys, write)
        if before is not None:
            before(places, keys)
        failures: list[Exception] = []
        predictor = Predictor(to_plain(config), version.name, version.version)
        prefix = f"/{MODEL}-v{version.version}"
        outcomes = application(Outcomes(to_plain(config)), "/outcomes", failures)
        with served(application(predictor, prefix, failures)) as address, served(outcomes) as other:
            yield Replica(
                address=address,
                outcomes=other,
                places=places,
                keys=keys,
                prefix=prefix,
                predictor=predictor,
                failures=failures,
                ledger=open_ledger(config),
            )
    assert failures == [], "the application let errors through"


@contextlib.contextmanager
def running_features(replica: Replica) -> Iterator[str]:
    """Run the application `features`, for the view `income` and the service `credit`. Yield its address."""
    online = OnlineConfig(map_size_gib=0.1)
    config = PlatformConfig(storage=StorageConfig(root=replica.places.root), online=online)
    for info in view_keys(INCOME, region="local"):
        key_store(replica.keys).ensure(info)
    service = FeatureService("credit", views=[INCOME])
    definitions = Definitions(module="m", views={INCOME.name: INCOME}, services={service.name: service})
    apply(definitions, open_ledger(config), actor="t")
    features = Features(to_plain(config))
    with served(application(features, "/features", replica.failures)) as address:
        yield address


def register(
    root: Path,
    config: PlatformConfig,
    signature: ModelSignature,
    keys: KeyAccess,
    write: Callable[[Path, ModelSignature], None] = write_model,
) -> ModelVersion:
    write(root / "new", signature)
    return Registry(open_ledger(config), layout(config.storage)).register(
        root / "new",
        name=MODEL,
        family="sum",
        task=signature.task.value,
        lineage=Lineage(training_set_hash=""),
        metrics={},
        store=key_store(keys),
        actor="t",
    )


def record(root: Path, key_socket: str, port: int, storage: StorageConfig | None = None) -> ClusterRecord:
    """Return the record of a cluster that consists only of this process."""
    storage = storage or StorageConfig(root=str(root))
    return ClusterRecord(
        cluster_id="",
        project_root=str(root),
        storage_root=storage.root,
        local_root=storage.local,
        ray_address=f"127.0.0.1:{port}",
        key_socket=key_socket,
        tls=False,
        ports={},
        pids={},
        dashboard_url="",
        edge_url="",
        metrics_url="",
        ray_metrics_url="",
        serve_http_url="",
        token_path="",
        temp_dir="",
        started_at="",
    )


def application(target: Predictor | Outcomes | Features, prefix: str, failures: list[Exception]) -> Any:
    """Return an ASGI application that calls the target in the same way as Serve.

    The prefix is the root path of the scope. This application answers health checks itself, like Serve.
    """

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        try:
            if scope["path"] == "/-/healthz":
                return await Response()(scope, receive, send)
            response = await target(Request(scope | {"root_path": prefix}, receive))
            await response(scope, receive, send)
        except Exception as error:
            failures.append(error)
            raise

    return app


@contextlib.contextmanager
def listener() -> Iterator[int]:
    """Yield a port that accepts connections, like the port of a head node."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def served(app: Any, *, host: str = "127.0.0.1", certificates: Path | None = None) -> Iterator[str]:
    """Serve an ASGI application and yield its address; with a folder of a node's certificate and key, by TLS."""
    tls: dict[str, Any] = {}
    if certificates is not None:
        tls = {"ssl_certfile": certificates / "node.pem", "ssl_keyfile": certificates / "node.key"}
    config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", **tls)
    server = uvicorn.Server(config)
    with socket.create_server((host, 0)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"{host}:{bound.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=10)
