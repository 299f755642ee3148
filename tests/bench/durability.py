"""`make bench BENCH=durability`: requests to one replica with each `replica.durability`.

The three replicas are addressed directly, without the edge, and take turns. Cases: 16 connections and one connection,
for each durability: `process` (the record is written), `disk` (and flushed to the disk), `shared` (and in PostgreSQL,
which runs on this machine with its default settings, so it flushes too).

    SECONDS=2 ROUNDS=3 makes a shorter run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.settings import Durability

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.bench._load import Measured, Target, has_wrk, measure
from tests.servers.object_store import object_store_environment
from tests.servers.postgresql import running_server
from tests.servers.replica import SharedState, running_replica

SECONDS = int(os.environ.get("SECONDS", "4"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
CASES = {"c16": 16, "c1": 1}
UNITS_OF = {"requests_per_s": "1/s", "p50_ms": "ms", "p99_ms": "ms"}
SIGNATURE = ModelSignature(
    task=Task.binary,
    inputs=tuple(InputSpec(name=f"f{number}", dtype="double") for number in range(16)),
    label="y",
    classes=(0, 1),
)
BODY = json.dumps(
    {"entities": [{"id": 1}], "features": {f"f{number}": number / 16 for number in range(16)}}
).encode()


def main() -> None:
    """Measure and write the results."""
    wrk = has_wrk()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bucket = stack.enter_context(object_store_environment())
        shared = SharedState(f"{bucket}/bench", stack.enter_context(running_server()))
        replicas = {
            durability: stack.enter_context(
                running_replica(
                    folder / durability.value,
                    SIGNATURE,
                    durability=durability,
                    shared=shared if durability is Durability.shared else None,
                )
            )
            for durability in Durability
        }
        turns: dict[tuple[str, Durability], list[Measured]] = {}
        for case, connections in CASES.items():
            for number in range(ROUNDS + 1):
                for durability, replica in replicas.items():
                    headers = {"Authorization": f"Bearer {replica.token()}"}
                    url = f"http://{replica.address}{replica.prefix}/v1/models/m:predict"
                    turn = measure(
                        Target(url=url, requests=[(headers, BODY)]),
                        connections=connections,
                        seconds=SECONDS,
                        wrk=wrk,
                    )
                    if number:
                        turns.setdefault((case, durability), []).append(turn)
    results = []
    for (case, durability), measured in turns.items():
        values = {
            metric: statistics.median(getattr(turn, metric) for turn in measured) for metric in UNITS_OF
        }
        results += [_result(f"{durability.value}_{case}", metric, value) for metric, value in values.items()]
        base = statistics.median(turn.requests_per_s for turn in turns[case, Durability.disk])
        print(
            f"{case:4} {durability.value:8} {values['requests_per_s']:8.0f} requests/s, p50 {values['p50_ms']:6.2f}, "
            f"p99 {values['p99_ms']:6.2f} ms; {values['requests_per_s'] / base:.2f} of disk"
        )
    output = Path(".falaj/bench/durability.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


def _result(case: str, metric: str, value: float) -> dict[str, Any]:
    return {"system": "falaj", "case": case, "metric": metric, "value": value, "unit": UNITS_OF[metric]}


if __name__ == "__main__":
    main()
