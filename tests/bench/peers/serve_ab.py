"""An A/B test as users of Ray Serve would write it: an ingress that awaits the handle of one of two models.

    python serve_ab.py PORT MODEL_FOLDER      with the environment that `tests/bench/serve.py` makes

`/bare` takes 16 numbers and returns a probability.
`/same` does the same work as a request to Falaj's edge: it checks and caches the token, reads features from the same
online store, and writes a record to a log. Falaj's own code does each of these steps. So the only difference is how the
request gets from one step to the next. The server runs until SIGTERM.
"""

from __future__ import annotations

import datetime as dt
import os
import signal
import sys
import uuid
import zlib
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from cluster.ledger import open_ledger
from cluster.records.schema import PredictionRecord
from cluster.records.segments import SegmentWriter
from cluster.registry import Registry
from cluster.runtime.loader import load_model
from cluster.runtime.signature import LIGHTGBM_FILE
from cluster.security.authorization.policy import Action
from cluster.security.keys.access import key_store, service_access
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig, StorageConfig
from cluster.storage import layout
from feature_jobs.store.catalog.log_keys import prediction_key, serving_purpose
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.online.reader import FeatureReader, open_online_store
from serve_apps.predictor.request import parse_predict
from serve_apps.replica.access import AccessCheck
from serve_apps.replica.http import answer, read_json, refusal
from serve_apps.rollout.assignment import Arm, assign, bounds
from tests.projects.scoring import MODEL

ROOT_VARIABLE = "BENCH_STORAGE_ROOT"
LIMITS = bounds(float(os.environ["BENCH_WEIGHT"]))


class BareModel:
    """A model behind a handle."""

    def __init__(self, folder: str) -> None:
        self._booster = lgb.Booster(model_file=f"{folder}/{LIGHTGBM_FILE}")

    async def __call__(self, inputs: list[float]) -> dict[str, Any]:
        [probability] = self._booster.predict(np.array([inputs]), num_threads=1)
        return {"probability": float(probability)}


class BareIngress:
    """An ingress that chooses the model by the unit."""

    def __init__(self, one: DeploymentHandle, two: DeploymentHandle) -> None:
        self._models = (one, two)

    async def __call__(self, request: Request) -> dict[str, Any]:
        model = self._models[zlib.crc32(request.headers["x-unit-id"].encode()) & 1]
        content: dict[str, Any] = await model.remote((await request.json())["x"])
        return content


class SameModel:
    """A model that reads features, predicts, and logs the prediction."""

    def __init__(self, version: int) -> None:
        config = platform()
        places, ledger = layout(config.storage), open_ledger(config)
        self._version = Registry(ledger, places).get(MODEL, version)
        purpose = serving_purpose(ledger, self._version)
        store = key_store(
            service_access(config, require_running_cluster(config), name=MODEL, purpose=purpose)
        )
        self._model = load_model(self._version, store)
        signature = self._model.signature
        self._inputs = {spec.name: spec for spec in signature.inputs}
        spec = service_spec(ledger, signature.service, signature.service_version)
        self._reader = FeatureReader(spec, open_online_store(config.online, places, store))
        folder = Path(places.predictions(MODEL)).parent.parent / "peer" / "predictions" / MODEL
        self._log = SegmentWriter(folder, store=store, key=prediction_key(ledger, self._version))

    async def __call__(self, body: dict[str, Any], arm: str, unit: str) -> dict[str, Any]:
        now = dt.datetime.now(dt.UTC)
        asked = parse_predict(body, self._inputs, now=now)
        columns = self._reader.read(asked.entities, asked.as_of).columns
        rows = self._model.predict(columns).rows()
        record = PredictionRecord(
            prediction_id=uuid.uuid4().hex,
            request_id="",
            time=now.isoformat(),
            model=MODEL,
            version=self._version.version,
            variant=arm,
            rollout="r",
            arm=arm,
            unit_hash=unit,
            as_of=asked.as_of.isoformat(),
            entities=asked.entities,
            features=columns,
            predictions=rows,
        )
        self._log.append(record)
        return {"prediction_id": record.prediction_id, "variant": arm, "predictions": rows}


class SameIngress:
    """An ingress that checks the token, then chooses the model by the unit."""

    def __init__(self, one: DeploymentHandle, two: DeploymentHandle) -> None:
        config = platform()
        self._models = (one, two)
        ledger = open_ledger(config)
        mine = Registry(ledger, layout(config.storage)).get(MODEL, 1).resource(region=config.cluster.region)
        self._access = AccessCheck.of(config, mine, ledger)

    async def __call__(self, request: Request) -> Response:
        try:
            self._access(request.headers.get("authorization"), Action.predict)
            unit = request.headers.get("x-unit-id", "")
            arm = assign("salt", unit.encode(), LIMITS)
            model = self._models[arm is Arm.treatment]
            return answer(await model.remote(await read_json(request), arm.value, unit))
        except Exception as error:  # noqa: BLE001 (Falaj's replica does the same)
            return refusal(error)


def platform() -> PlatformConfig:
    """Return the configuration of the Falaj project. The server uses the store, keys and tokens of that project."""
    return PlatformConfig(storage=StorageConfig(root=os.environ[ROOT_VARIABLE]))


def deployment(kind: type, name: str) -> Any:
    """Return a deployment with one replica. Its limits are so high that they do not slow down requests."""
    return serve.deployment(
        kind,
        name=name,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0.1},
        logging_config={"enable_access_log": False},
    )


def main() -> None:
    """Serve both applications."""
    port, folder = int(sys.argv[1]), sys.argv[2]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    bare = [deployment(BareModel, name).bind(folder) for name in ("bare_a", "bare_b")]
    same = [deployment(SameModel, f"same_{version}").bind(version) for version in (1, 2)]
    serve.run(deployment(BareIngress, "bare").bind(*bare), name="bare", route_prefix="/bare")
    serve.run(deployment(SameIngress, "same").bind(*same), name="same", route_prefix="/same")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the exit ends the Ray that this process started
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
