"""`make bench BENCH=serve_cost`: predictions per core-second of each engine, and the price of a thousand predictions.

The same networks run in ONNX Runtime with int8 and with float32 (Falaj's engine), and in torch. Trees run in LightGBM.
A case is `<width>x<depth> <precision> batch <rows>`, or `trees <rounds>x<leaves> ...`. Core-seconds are the CPU time of
the process with one thread, so other work on the machine has little effect. These cases measure only the model.

A case `request ...` measures everything that a replica does for one prediction: token, JSON, encoding, model, the log
on disk, the answer. HTTP itself is left out; the benchmark `serve` includes it. The client sends the features. If torch
finds a GPU, the network also runs on the GPU, measured in GPU-seconds of wall time.

    PRICES=my.yaml uses the prices in my.yaml instead of configs/prices/assumed.yaml.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from omegaconf import DictConfig, OmegaConf
from starlette.requests import Request

from cluster.runtime import InputSpec, Model, ModelSignature, Precision, Task, open_model
from cluster.runtime.device_choice import CUDA, Hardware
from cluster.runtime.encoding import Matrix
from cluster.runtime.signature import NETWORK_FILE, WEIGHTS_FILE
from cluster.runtime.torch_engine import TorchEngine
from cluster.settings_conversion import load

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.samples.network import rows, write_network
from tests.samples.trees import write_trees
from tests.servers.replica import Replica, running_replica

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((128, 2), (512, 3), (1024, 4))
TREES = (200, 31)
BATCHES, ROUNDS, ROUND_S = (1, 64), 5, 0.3
NUMBERS, CATEGORIES = 20, 6
SIGNATURE = ModelSignature(
    task=Task.binary,
    inputs=(
        *(InputSpec(name=f"v__n{place}", dtype="double") for place in range(NUMBERS)),
        *(
            InputSpec(name=f"v__c{place}", dtype="string", categories=tuple("abcdefghij"))
            for place in range(CATEGORIES)
        ),
    ),
    label="y",
    classes=(0, 1),
)
Run = Callable[[int], None]
"""Function that predicts one batch a given number of times."""
REQUESTS = ("128x2 float32", "1024x4 int8", "trees 200x31")
"""Models for which a case `request ...` is measured."""


@dataclass(kw_only=True, slots=True)
class PricesConfig:
    """Prices of machines."""

    currency: str = "USD"
    core_hour: float = 0.05
    """Price of one CPU core for an hour."""
    gpu_hour: float = 0.80
    """Price of one GPU for an hour."""

    def __post_init__(self) -> None:
        if self.core_hour <= 0 or self.gpu_hour <= 0:
            raise ValueError("prices must be positive.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One measured case."""

    system: str
    name: str
    batch: int
    run: Run


def writers() -> dict[str, tuple[ModelSignature, Callable[[Path, ModelSignature], None]]]:
    """Return for every model, by name, its signature and the function that writes its files."""
    rounds, leaves = TREES
    found: dict[str, tuple[ModelSignature, Callable[[Path, ModelSignature], None]]] = {}
    for width, depth in SIZES:
        for precision in Precision:
            name = f"{width}x{depth} {precision.value}"
            write = functools.partial(write_network, width=width, depth=depth)
            found[name] = replace(SIGNATURE, precision=precision), write
    trees = functools.partial(write_trees, rounds=rounds, num_leaves=leaves)
    return found | {f"trees {rounds}x{leaves}": (SIGNATURE, trees)}


def cases(folder: Path, stack: ExitStack) -> Iterator[Case]:
    """Yield all cases, at every batch size."""
    for name, (signature, write) in writers().items():
        place = folder / name.replace(" ", "-")
        write(place, signature)
        yield from scoring("falaj", name, open_model(place))
        if signature.precision is Precision.float32 and (place / NETWORK_FILE).exists():
            yield from in_torch(name, place)
        if name in REQUESTS:
            replica = stack.enter_context(
                running_replica(folder / f"of-{place.name}", signature, write=write)
            )
            for batch in BATCHES:
                yield Case(system="falaj", name=f"request {name}", batch=batch, run=requests(replica, batch))


def in_torch(name: str, place: Path) -> Iterator[Case]:
    """Yield the cases of a network in torch, on the CPU, and on a GPU if there is one."""
    shape, weights = ((place / part).read_bytes() for part in (NETWORK_FILE, WEIGHTS_FILE))
    yield from scoring("torch", name, Model(SIGNATURE, TorchEngine(shape, weights, hardware=Hardware())))
    if torch.cuda.is_available():
        engine = TorchEngine(shape, weights, hardware=Hardware(device=CUDA))
        yield from scoring("torch_gpu", name, Model(SIGNATURE, engine))


def scoring(system: str, name: str, model: Model) -> Iterator[Case]:
    """Yield the cases of a model on encoded rows."""

    def run(times: int, matrix: Matrix) -> None:
        for _ in range(times):
            model.predict_matrix(matrix)

    for batch in BATCHES:
        matrix = rows(SIGNATURE, batch)
        yield Case(system=system, name=name, batch=batch, run=functools.partial(run, matrix=matrix))


def requests(replica: Replica, batch: int) -> Run:
    """Return a function that passes whole `:predict` requests to the replica, in the same way as Serve."""
    matrix = rows(SIGNATURE, batch)
    columns: dict[str, list[Any]] = {}
    for place, spec in enumerate(SIGNATURE.inputs):
        values = [None if value != value else value for value in matrix[:, place].tolist()]
        known = spec.categories
        columns[spec.name] = [
            value if known is None or value is None else known[int(value)] for value in values
        ]
    body = orjson.dumps({"entities": [{"id": number} for number in range(batch)], "features": columns})
    scope = {
        "type": "http",
        "method": "POST",
        "path": f"{replica.prefix}/v1/models/m:predict",
        "root_path": replica.prefix,
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {replica.token()}".encode())],
    }
    loop = asyncio.new_event_loop()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def several(times: int) -> None:
        for _ in range(times):
            response = await replica.predictor(Request(scope, receive))
            assert response.status_code == 200, response.body

    return lambda times: loop.run_until_complete(several(times))


def per_second(case: Case) -> float:
    """Return predictions per core-second or GPU-second of one round."""
    clock = time.perf_counter if case.system == "torch_gpu" else time.process_time
    calls, began = 0, clock()
    while (spent := clock() - began) < ROUND_S:
        case.run(10)
        calls += 10
    return calls * case.batch / spent


def measured(every: Iterable[Case]) -> dict[tuple[str, str, int], float]:
    """Return the median of each case over all rounds. Each case runs once per round."""
    found: dict[tuple[str, str, int], list[float]] = {}
    in_turn = list(every)
    for _ in range(ROUNDS):
        for case in in_turn:
            found.setdefault((case.system, case.name, case.batch), []).append(per_second(case))
    return {key: statistics.median(values) for key, values in found.items()}


def apart(folder: Path) -> Iterator[str]:
    """For each size of network, yield a text with the difference between the int8 and the float32 scores."""
    matrix = rows(SIGNATURE, 1000)
    for width, depth in SIZES:
        whole, small = (
            open_model(folder / f"{width}x{depth}-{precision.value}").predict_matrix(matrix).scores
            for precision in Precision
        )
        difference = np.abs(whole - small)
        yield (
            f"  {width}x{depth}: int8 differs from float32 by {difference.mean():.4f} on average, "
            f"{difference.max():.4f} at most"
        )


def prices() -> PricesConfig:
    """Return the configured prices."""
    path = os.environ.get("PRICES", ROOT / "configs" / "prices" / "assumed.yaml")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return load(config, PricesConfig)


def results(found: dict[tuple[str, str, int], float], price: PricesConfig) -> list[dict[str, Any]]:
    """Return the results in the format that all benchmarks write."""
    lines = []
    for (system, name, batch), rate in found.items():
        unit = "gpu_s" if system == "torch_gpu" else "core_s"
        case = {"system": system, "case": f"{name} batch {batch}"}
        lines.append(case | {"metric": f"predictions_per_{unit}", "value": rate, "unit": f"1/{unit}"})
        cost = cost_per_1000(rate, system, price)
        lines.append(case | {"metric": "cost_per_1000_predictions", "value": cost, "unit": price.currency})
    return lines


def cost_per_1000(rate: float, system: str, price: PricesConfig) -> float:
    """Return the price of a thousand predictions, if a core or GPU makes `rate` predictions per second."""
    return 1000 / rate / 3600 * (price.gpu_hour if system == "torch_gpu" else price.core_hour)


def table(found: dict[tuple[str, str, int], float], price: PricesConfig) -> Iterator[str]:
    """Yield the lines of a table. The ratio compares with torch on the CPU, for the same network and batch size."""
    yield f"{'':9} {'case':22} {'batch':>5} {'per core-s':>11} {'x torch':>8} {f'{price.currency} per 1,000':>14}"
    for (system, name, batch), rate in found.items():
        torch_rate = found.get(("torch", f"{name.split()[0]} float32", batch))
        ratio = f"{rate / torch_rate:.2f}" if torch_rate else ""
        cost = cost_per_1000(rate, system, price)
        yield f"{system:9} {name:22} {batch:5} {rate:11,.0f} {ratio:>8} {cost:14.8f}"


def main() -> None:
    """Measure, print and write the results."""
    price = prices()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        found = measured(cases(folder, stack))
        print("\n".join([*apart(folder), *table(found, price)]))
    print(f"  at {price.core_hour} {price.currency} a core-hour and {price.gpu_hour} a GPU-hour")
    if not torch.cuda.is_available():
        print("  no GPU here: torch on one was not measured")
    output = Path(".falaj/bench/serve_cost.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results(found, price), indent=1))


if __name__ == "__main__":
    main()
