"""`make bench BENCH=train_memory`: peak memory of a training worker that reads 1M and 10M rows of 24 columns.

Each size has a process of its own. `network` reads the first epoch and the validation rows, as a worker of a network
does. Its peak at 10M rows may be at most 1.2 times that at 1M rows. `trees` fills LightGBM's data set and fits two
segments. Its peak may grow by at most one byte for each input and 40 bytes for each row.

    python tests/bench/train_memory.py trees 1000000 4000000
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.runtime.signature import InputSpec, ModelSignature, Task
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import Protection
from jobs.train.lightgbm import Parameters, fit_trees
from jobs.train.rows.batches import RowReader
from jobs.train.rows.encoded import EncodedRows, Part
from jobs.train.rows.file import RowFile, open_row_file
from tests.servers.key_broker import running_broker

COLUMNS, GROUP_ROWS, BATCH = 24, 65_536, 1024
SIZES = (1_000_000, 10_000_000)
MOST_TIMES = 1.2
"""A network's worker may have so many times the memory for the larger size."""
MOST_BYTES = COLUMNS + 40
"""LightGBM may need so many bytes more for each row more."""
SIGNATURE = ModelSignature(
    task=Task.binary,
    inputs=tuple(InputSpec(name=f"x{number}", dtype="float32") for number in range(COLUMNS)),
    label="y",
    classes=(0, 1),
)


def write_rows(path: str, rows: int, files: object) -> None:
    """Write random rows. They are float32, so that the file is small enough for the disk."""
    draw = np.random.default_rng(0)
    table = pa.table(
        {f"x{n}": draw.normal(size=rows).astype(np.float32) for n in range(COLUMNS)}
        | {"y": draw.integers(0, 2, rows)}
    )
    files.write(table, path, Protection(default="rows"), row_group_rows=GROUP_ROWS)  # type: ignore[attr-defined]


def read_rows(file: RowFile, kind: str) -> None:
    """Do a worker's work, and print its peak memory in MiB."""
    # A worker gets the parts with one byte for each row. They are drawn here in the same size, group by group, because
    # the draw itself needs eight bytes for each row.
    part_of, draw = (
        np.array([Part.held_out] * 5 + [Part.validation] + [Part.fit] * 14, np.uint8),
        np.random.default_rng(1),
    )
    parts = np.concatenate([part_of[draw.integers(len(part_of), size=size)] for size in file.group_sizes])
    rows = EncodedRows(rows=file, signature=SIGNATURE, parts=parts)
    if kind == "trees":
        parameters = Parameters(rounds=3, segment_rounds=2, num_threads=1)
        fit_trees(rows, parameters, 0, files=None, on_round=lambda completed, losses: None)
    else:
        reader = RowReader(rows, seed=0)
        steps = int((parts == Part.fit).sum()) // BATCH
        for _ in reader.batches(0, first_step=0, steps=steps, batch_rows=BATCH):
            pass
        for _ in reader.validation(rank=0, workers=2):
            pass
    print(json.dumps({"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def peak_mib(kind: str, rows: int) -> float:
    """Return the peak memory of a new process that does a worker's work, in MiB."""
    with tempfile.TemporaryDirectory() as folder, running_broker("rows") as access:
        path = str(Path(folder) / "rows.parquet")
        pid = os.fork()
        if pid == 0:  # the writer's memory must not count
            write_rows(path, rows, protected_files(access))
            os._exit(0)
        os.waitpid(pid, 0)
        arguments = json.dumps(
            {"socket": access.socket, "token": access.token.file, "path": path, "kind": kind}
        )
        output = subprocess.run(
            [sys.executable, __file__, "--worker", arguments], capture_output=True, text=True, check=True
        ).stdout
    return float(json.loads(output.splitlines()[-1])["mib"])


def measure(kind: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure both sizes, and return the results."""
    peaks = []
    for rows in sizes:
        peaks.append(peak_mib(kind, rows))
        print(f"{kind}: {rows:,} rows: peak {peaks[-1]:.0f} MiB", flush=True)
    bytes_per_row = (peaks[1] - peaks[0]) * 2**20 / (sizes[1] - sizes[0])
    values = {
        f"peak_{sizes[0]}_rows": (peaks[0], "MiB"),
        f"peak_{sizes[1]}_rows": (peaks[1], "MiB"),
        "times": (peaks[1] / peaks[0], "1"),
        "bytes_per_row": (bytes_per_row, "B"),
    }
    return [
        {"system": "falaj", "case": kind, "metric": metric, "value": value, "unit": unit}
        for metric, (value, unit) in values.items()
    ]


def main(kinds: tuple[str, ...], sizes: tuple[int, ...]) -> int:
    """Measure, write the results, and return 1 if one is above its limit."""
    results, code = [], 0
    for kind in kinds:
        results += measure(kind, sizes)
        metric, most = ("times", MOST_TIMES) if kind == "network" else ("bytes_per_row", MOST_BYTES)
        value = next(
            result["value"] for result in results if (result["case"], result["metric"]) == (kind, metric)
        )
        print(f"{kind}: {metric} {value:.2f}, at most {most:g}")
        code |= value > most
    output = Path(".falaj/bench/train_memory.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))
    return int(code)


def worker(arguments: str) -> None:
    """Measure one size in this process."""
    from cluster.security.keys.access import KeyAccess
    from cluster.security.tokens.source import TokenSource

    given = json.loads(arguments)
    access = KeyAccess(socket=given["socket"], token=TokenSource(file=given["token"]))
    read_rows(open_row_file(given["path"], access, protection=Protection(default="rows")), given["kind"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        given = tuple(int(size) for size in sys.argv[2:])
        sys.exit(main((sys.argv[1],) if len(sys.argv) > 1 else ("network", "trees"), given or SIZES))
