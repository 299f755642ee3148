"""`make bench BENCH=serve_cost`: predictions per core-second of each engine, and what a thousand cost.

One network in ONNX Runtime as int8 and as float32 (ours), and in torch; trees in LightGBM beside it. A case is
`<width>x<depth> <precision> batch <rows>`, or `trees <rounds>x<leaves> …`. Core-seconds are the process's CPU time with
one thread, so a busy machine disturbs little. It is the model's share of a prediction alone: what HTTP, identity,
features and the log take beside it is the bench `serve`. Where torch finds a GPU the network runs there too, in
GPU-seconds of the wall clock.

    PRICES=my.yaml takes other prices than configs/prices/assumed.yaml.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from cluster.runtime import InputSpec, Model, ModelSignature, Precision, Task, open_model
from cluster.runtime.encoding import Matrix
from cluster.runtime.hardware import CUDA, Hardware
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import NETWORK_FILE, WEIGHTS_FILE
from cluster.runtime.torch_engine import TorchEngine
from cluster.settings import load

# This file is run by its path, which leaves the project's root out.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.network import rows, write_network
from tests.trees import write_trees

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
Score = Callable[[Matrix], Scores]


@dataclass(kw_only=True, slots=True)
class PricesConfig:
    """What machines cost."""

    currency: str = "USD"
    core_hour: float = 0.05
    """A CPU core for an hour."""
    gpu_hour: float = 0.80
    """A GPU for an hour."""

    def __post_init__(self) -> None:
        if self.core_hour <= 0 or self.gpu_hour <= 0:
            raise ValueError("prices must be positive.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is measured."""

    system: str
    name: str
    batch: int
    score: Score
    on_gpu: bool = False


def networks(folder: Path) -> Iterator[tuple[str, str, Score, bool]]:
    """System, name, what scores, and whether on a GPU: each network in each engine."""
    for width, depth in SIZES:
        size = f"{width}x{depth}"
        scores = {}
        for precision in (Precision.int8, Precision.float32):
            place = folder / f"{size}-{precision.value}"
            write_network(place, replace(SIGNATURE, precision=precision), width=width, depth=depth)
            model = open_model(place)
            scores[precision] = model.predict_matrix(rows(SIGNATURE, 1000)).scores
            yield "falaj", f"{size} {precision.value}", scored_by(model.predict_matrix), False
        shape, weights = ((place / name).read_bytes() for name in (NETWORK_FILE, WEIGHTS_FILE))
        cpu = Model(SIGNATURE, TorchEngine(shape, weights, hardware=Hardware()))
        yield "torch", f"{size} float32", scored_by(cpu.predict_matrix), False
        if torch.cuda.is_available():
            gpu = Model(SIGNATURE, TorchEngine(shape, weights, hardware=Hardware(device=CUDA)))
            yield "torch_gpu", f"{size} float32", scored_by(gpu.predict_matrix), True
        apart = np.abs(scores[Precision.int8] - scores[Precision.float32])
        print(
            f"  {size}: int8 differs from float32 by {apart.mean():.5f} on average, {apart.max():.5f} at most"
        )


def trees(folder: Path) -> Iterator[tuple[str, str, Score, bool]]:
    """The same of trees."""
    rounds, leaves = TREES
    write_trees(folder / "trees", SIGNATURE, rounds=rounds, num_leaves=leaves)
    yield "falaj", f"trees {rounds}x{leaves}", scored_by(open_model(folder / "trees").predict_matrix), False


def scored_by(predict: Callable[[Matrix], Any]) -> Score:
    """A model's scores alone."""
    return lambda matrix: predict(matrix).scores  # type: ignore[no-any-return]


def cases(folder: Path) -> list[Case]:
    """All, at every batch size."""
    return [
        Case(system=system, name=name, batch=batch, score=score, on_gpu=on_gpu)
        for system, name, score, on_gpu in (*networks(folder), *trees(folder))
        for batch in BATCHES
    ]


def per_second(case: Case) -> float:
    """Predictions per core-second, or GPU-second, of one round."""
    matrix = rows(SIGNATURE, case.batch)
    clock = time.perf_counter if case.on_gpu else time.process_time
    calls, began = 0, clock()
    while (spent := clock() - began) < ROUND_S:
        for _ in range(10):
            case.score(matrix)
        calls += 10
    return calls * case.batch / spent


def measured(every: list[Case]) -> dict[tuple[str, str, int], float]:
    """Medians over rounds in which each case has its turn."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for case in every:
            found.setdefault((case.system, case.name, case.batch), []).append(per_second(case))
    return {key: statistics.median(values) for key, values in found.items()}


def prices() -> PricesConfig:
    """As configured."""
    path = os.environ.get("PRICES", ROOT / "configs" / "prices" / "assumed.yaml")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return load(config, PricesConfig)


def results(found: dict[tuple[str, str, int], float], price: PricesConfig) -> list[dict[str, Any]]:
    """As benches write them."""
    lines = []
    for (system, name, batch), rate in found.items():
        on_gpu = system == "torch_gpu"
        hour, unit = (price.gpu_hour, "gpu_s") if on_gpu else (price.core_hour, "core_s")
        case = {"system": system, "case": f"{name} batch {batch}"}
        cost = 1000 / rate * hour / 3600
        lines.append(case | {"metric": f"predictions_per_{unit}", "value": rate, "unit": f"1/{unit}"})
        lines.append(case | {"metric": "cost_per_1000_predictions", "value": cost, "unit": price.currency})
    return lines


def table(found: dict[tuple[str, str, int], float], price: PricesConfig) -> Iterator[str]:
    """For people; the ratio is to torch on CPU, of the same network and batch."""
    yield f"{'':8} {'case':20} {'batch':>5} {'per core-s':>12} {'x torch':>8} {f'{price.currency} per 1M':>12}"
    for (system, name, batch), rate in found.items():
        torch_rate = found.get(("torch", f"{name.split()[0]} float32", batch))
        ratio = f"{rate / torch_rate:.2f}" if torch_rate else ""
        hour = price.gpu_hour if system == "torch_gpu" else price.core_hour
        yield f"{system:8} {name:20} {batch:5} {rate:12,.0f} {ratio:>8} {1e6 / rate * hour / 3600:12.5f}"


def main() -> None:
    """Measure, print, write."""
    price = prices()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(cases(Path(folder)))
    print("\n".join(table(found, price)))
    print(f"  at {price.core_hour} {price.currency} a core-hour and {price.gpu_hour} a GPU-hour")
    if not torch.cuda.is_available():
        print("  no GPU here: torch on one was not measured")
    output = Path(".falaj/bench/serve_cost.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results(found, price), indent=1))


if __name__ == "__main__":
    main()
