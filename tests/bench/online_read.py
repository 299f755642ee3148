"""`make bench BENCH=online_read`: features of 1 and of 100 entities by key, out of a million, in turns with Feast.

Falaj's features are typed, checked against a TTL, and encrypted like internal columns. They are read from LMDB in this
process, and from a Redis server that the benchmark starts. A case is `<engine> <entities>` with 10 features, `... x50`
with 50 features, or `... list384` with one list of 384 float32. In the list case, there are only a tenth of the
entities, and Feast is not measured.

Feast is installed into its own environment below `build/`. If the installation fails, a message is printed and Feast is
left out. Feast has a minute to load its store, so its stores are smaller than Falaj's. Their size is printed.

    ENTITIES=100000 makes a shorter run.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cluster.security.keys.access import key_store
from cluster.settings import OnlineConfig, OnlineKind
from cluster.storage import Layout
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec, ViewSpec
from feature_jobs.store.online.reader import FeatureReader, epoch_microseconds, open_online_store
from feature_jobs.store.online.rows import OnlineRow
from feature_jobs.store.online.store import OnlineStore

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.servers.key_broker import running_broker
from tests.servers.redis_server import running_redis

ROOT = Path(__file__).resolve().parents[2]
ENTITIES = int(os.environ.get("ENTITIES", "1000000"))
AT = datetime(2026, 1, 1, tzinfo=UTC)
FEATURES, BATCHES, ROUNDS = (10, 50), {1: 2000, 100: 200}, 5
LIST = 384
"""Number of elements of the list. Where functions take a number of features, this value means the list case."""
FEAST, FEAST_LOAD_S, FEAST_SHARE = "feast[redis]==0.67.0", 60.0, 10
"""Feast makes a tenth of the calls, because each call takes much longer."""
ENVIRONMENT = ROOT / "build" / "feast"

Measure = Callable[[int, int], list[int]]
"""Function of the number of entities per call and the number of calls. It returns the nanoseconds of each call."""


def view_of(features: int) -> ViewSpec:
    """Return a view with `features` internal columns, or with one list."""
    names = ["f0"] if features == LIST else [f"f{number}" for number in range(features)]
    dtype = f"list<float32, {LIST}>" if features == LIST else "float64"
    fields = [FieldSpec(name=name, dtype=dtype, sensitivity="internal", categorical=False) for name in names]
    return ViewSpec(name=f"v{features}", version="1", join_keys=["id"], fields=fields, ttl_s=86_400.0)


def rows(features: int) -> Iterator[OnlineRow]:
    """Yield one row per entity."""
    draw, at = np.random.default_rng(0), epoch_microseconds(AT)
    entities = entities_of(features)
    for first in range(0, entities, 10_000):
        piece = draw.standard_normal((min(10_000, entities - first), features)).tolist()
        for number, values in enumerate(piece, start=first):
            row = [values] if features == LIST else values
            yield OnlineRow(keys=(number,), event_us=at, created_us=at, seq=number, values=row)


def entities_of(features: int) -> int:
    """Return the number of entities of a case."""
    return ENTITIES // 10 if features == LIST else ENTITIES


def ours(store: OnlineStore, kind: str, features: int) -> Measure:
    """Load a view into Falaj's store, and return the function that measures reads."""
    view, began = view_of(features), time.monotonic()
    store.replace(view, {"id": "int64"}, rows(features))
    reader = FeatureReader(ServiceSpec(name="s", version="1", views=[view]), store)
    print(f"  {kind}, {features} features: loaded in {time.monotonic() - began:.0f} s")
    entities = entities_of(features)
    vectors = reader.read([{"id": entities - 1}, {"id": entities}], AT)
    assert list(vectors.status[f"v{features}__f0"]) == ["present", "missing"]
    return measured(reader, entities)


def measured(reader: FeatureReader, entities: int) -> Measure:
    """Return the function that measures reads of a reader. Each call reads other entities."""
    draw = random.Random(1)

    def measure(size: int, calls: int) -> list[int]:
        taken = []
        for _ in range(calls):
            asked = [{"id": draw.randrange(entities)} for _ in range(size)]
            began = time.perf_counter_ns()
            reader.read(asked, AT)
            taken.append(time.perf_counter_ns() - began)
        return taken

    return measure


def feast_python() -> str | None:
    """Return the Python of Feast's environment, or None if Feast cannot be installed.

    If the environment does not exist, this function creates it.
    """
    python = ENVIRONMENT / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        found = subprocess.run([python, "-c", "import feast, redis"], capture_output=True, check=False)
        if found.returncode:
            pip = [python, "-m", "pip", "install", "--quiet", FEAST, "pandas<3"]
            subprocess.run(pip, check=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"  Feast is left out: {FEAST} cannot be installed here ({error}).")
        return None
    return str(python)


def feast(python: str, kind: str, port: int, features: int, stack: ExitStack) -> Measure | None:
    """Load a Feast store in its own process. Return the function that measures reads, or None if loading fails."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    script = ROOT / "tests" / "bench" / "peers" / "feast_online.py"
    numbers = [str(port), str(ENTITIES), str(features), str(FEAST_LOAD_S)]
    process = subprocess.Popen(
        [python, str(script), folder, kind, *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"FEAST_USAGE": "False"},
    )
    stack.callback(process.kill)
    assert process.stdin is not None
    assert process.stdout is not None
    asked, said = process.stdin, process.stdout
    loaded = said.readline()
    if not loaded:
        print(f"  Feast with {kind} is left out: it ended with {process.wait()}.")
        return None
    print(f"  feast_{kind}, {features} features: {int(loaded):,} entities loaded in {FEAST_LOAD_S:.0f} s")

    def measure(size: int, calls: int) -> list[int]:
        asked.write(f"{size} {max(calls // FEAST_SHARE, 20)}\n")
        asked.flush()
        taken: list[int] = json.loads(said.readline())
        return taken

    return measure


def compare(engine: str, features: int, systems: dict[str, Measure]) -> list[dict[str, Any]]:
    """Measure the systems in turns, in several rounds. Return the medians of the rounds' percentiles."""
    results = []
    for size, calls in BATCHES.items():
        taken: dict[str, list[list[int]]] = {name: [] for name in systems}
        for number in range(ROUNDS + 1):
            for name, measure in systems.items():
                of_round = measure(size, calls)
                if number:  # the first round is a warm-up
                    taken[name].append(of_round)
        suffix = {FEATURES[0]: "", LIST: f" list{LIST}"}.get(features, f" x{features}")
        case = f"{engine} {size}{suffix}"
        for name, rounds in taken.items():
            for percent in (50, 99):
                value = statistics.median(float(np.percentile(one, percent)) for one in rounds) / 1e6
                results.append(
                    {"system": name, "case": case, "metric": f"p{percent}_ms", "value": value, "unit": "ms"}
                )
        p50 = {
            name: statistics.median(map(statistics.median, rounds)) / 1e6 for name, rounds in taken.items()
        }
        shown = (f"{name} p50 {value:.3f} ms ({value / p50['falaj']:.1f}x)" for name, value in p50.items())
        print(f"{case:16} {', '.join(shown)}")
    return results


def main() -> None:
    """Measure and write the results."""
    python = feast_python()
    results: list[dict[str, Any]] = []
    keys = [f"online/v{features}/internal" for features in (*FEATURES, LIST)]
    with ExitStack() as stack:
        access = stack.enter_context(running_broker(*keys))
        url = stack.enter_context(running_redis())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        configs = {
            "lmdb": OnlineConfig(map_size_gib=8.0),
            "redis": OnlineConfig(kind=OnlineKind.redis, url=url),
        }
        for engine, config in configs.items():
            store = open_online_store(config, Layout(str(folder)), key_store(access), readonly=False)
            for features in (*FEATURES, LIST):
                with ExitStack() as peers:
                    kind = "sqlite" if engine == "lmdb" else "redis"
                    port = urlsplit(url).port or 0
                    asked = python is not None and features != LIST
                    peer = feast(str(python), kind, port, features, peers) if asked else None
                    # Our store is loaded after the peer. Some kernels reclaim memory that is idle for a minute, and
                    # the benchmark measures a store in memory.
                    systems = {"falaj": ours(store, engine, features)}
                    if peer is not None:
                        systems[f"feast_{kind}"] = peer
                    results += compare(engine, features, systems)
    output = Path(".falaj/bench/online_read.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
