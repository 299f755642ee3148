"""The peer's application: an A/B test and a store of pushed values, as a user of Ray Serve writes them.

    python -m tests.nodes.ray_serve_app REDIS_URL NUM_NODES     # on the head: starts the application and ends

An ingress chooses one of two models by the unit. A model reads 16 features from Redis, predicts, and appends a record
to a file of its node before it answers. A push writes a value to Redis.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
import zlib
from typing import Any

import lightgbm as lgb
import numpy as np
import ray
import redis.asyncio
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from tests.projects import scoring
from tests.servers.polling import wait_until

DISK, MODELS = "PEER_DISK", "PEER_MODELS"
"""Environment variables of a node: its folder for records, and the folder of the models."""
RECORDS = "records.jsonl"
APP, PORT = "score", 8000
REPLICAS: dict[str, Any] = {"num_replicas": 3, "max_replicas_per_node": 1}
"""One on each node, so that each failure of a node meets a replica."""
NODES_S = 60
"""How long the nodes may take to join, after the raylet of each has started."""
ACTOR = {"num_cpus": 0.1}


class Model:
    """A model that reads features, predicts, and logs the prediction."""

    def __init__(self, number: int, url: str) -> None:
        self._booster = lgb.Booster(model_file=f"{os.environ[MODELS]}/{number}.txt")
        self._redis = redis.asyncio.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)
        self._log = open(f"{os.environ[DISK]}/{RECORDS}", "a", buffering=1)  # noqa: SIM115 (open while it serves)

    async def __call__(self, account: int) -> dict[str, Any]:
        values = await self._redis.hvals(f"account:{account}")
        inputs = np.array([[float(value) for value in values]])
        [probability] = self._booster.predict(inputs, num_threads=1)
        prediction_id = uuid.uuid4().hex
        self._log.write(
            json.dumps({"id": prediction_id, "account": account, "value": float(probability)}) + "\n"
        )
        return {"prediction_id": prediction_id, "predictions": [{"probability": float(probability)}]}


class Ingress:
    """Chooses the model, and takes pushes."""

    def __init__(self, one: DeploymentHandle[Any], two: DeploymentHandle[Any], url: str) -> None:
        self._models = (one, two)
        self._redis = redis.asyncio.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        if request.url.path.endswith("push"):
            [row] = body["rows"]
            await self._redis.hset("pushed", row["keys"]["account_id"], row["features"]["number"])
            return {"stored": 1}
        model = self._models[zlib.crc32(request.headers["x-unit-id"].encode()) & 1]
        answer: dict[str, Any] = await model.remote(body["entities"][0]["account_id"])
        return answer


def num_alive() -> int:
    """Return the number of nodes in the cluster."""
    return sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]


def main() -> None:
    """Start the application when all nodes are in the cluster, and wait until it is healthy."""
    url, num_nodes = sys.argv[1], int(sys.argv[2])
    ray.init(address="auto", log_to_driver=False)
    wait_until(lambda: num_alive() == num_nodes, "all nodes", seconds=NODES_S)
    serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host="0.0.0.0", port=PORT))  # noqa: S104
    models = [
        serve.deployment(Model, name=f"model-{number}", ray_actor_options=ACTOR, **REPLICAS).bind(  # type: ignore[attr-defined]
            number, url
        )
        for number in range(2)
    ]
    ingress = serve.deployment(Ingress, ray_actor_options=ACTOR, **REPLICAS)
    serve.run(ingress.bind(*models, url), name=APP, route_prefix=f"/{APP}")  # type: ignore[attr-defined]


def write_state(url: str, folder: str) -> None:
    """Write the features to Redis, and two models to a folder."""
    client = redis.Redis.from_url(url)
    inputs = scoring.features()
    with client.pipeline(transaction=False) as pipeline:
        for account, values in enumerate(inputs):
            pipeline.hset(f"account:{account}", mapping={f"f{n}": float(v) for n, v in enumerate(values)})
        pipeline.execute()
    for number in range(2):
        label = inputs[:, 0] + inputs[:, 1] * inputs[:, 2] > 0
        options = {"objective": "binary", "num_leaves": 15, "num_threads": 1, "verbose": -1, "seed": number}
        lgb.train(options, lgb.Dataset(inputs, label), 40).save_model(f"{folder}/{number}.txt")


if __name__ == "__main__":
    main()
