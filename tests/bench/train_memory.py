"""Peak memory of a training worker that reads 1M and 10M rows of 24 columns: `python tests/bench/train_memory.py`.

Each size has a process of its own. It reads the first steps of two epochs, and the validation rows, as a worker does.
With `trees`, the process fills LightGBM's data set and fits two segments instead. Two numbers after `network` or
`trees` are other numbers of rows.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

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
    # A worker gets the parts with one byte for each row. They are drawn here in the same size.
    part_of = np.array([Part.held_out] * 5 + [Part.validation] + [Part.fit] * 14, np.uint8)
    parts = part_of[np.random.default_rng(1).integers(len(part_of), size=file.num_rows, dtype=np.uint8)]
    rows = EncodedRows(rows=file, signature=SIGNATURE, parts=parts)
    if kind == "trees":
        labels = np.asarray(file["y"].to_numpy())
        targets = {part: labels[parts == part] for part in (Part.fit, Part.validation)}
        parameters = Parameters(rounds=3, segment_rounds=2, num_threads=1)
        fit_trees(rows, targets, parameters, 0, files=None, on_round=lambda completed, losses: None)
    else:
        reader = RowReader(rows, seed=0)
        steps = int((parts == Part.fit).sum()) // BATCH
        for _ in reader.batches(0, first_step=0, steps=steps, batch_rows=BATCH):
            pass
        for _ in reader.validation(rank=0, workers=2):
            pass
    print(json.dumps({"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main(kind: str, sizes: tuple[int, ...]) -> None:
    """Measure both sizes and print the ratio."""
    peaks = []
    for rows in sizes:
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
            peaks.append(json.loads(output.splitlines()[-1])["mib"])
        print(f"{kind}: {rows:,} rows: peak {peaks[-1]:.0f} MiB", flush=True)
    print(f"{kind}: ratio {peaks[1] / peaks[0]:.2f}")


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
        main(sys.argv[1] if len(sys.argv) > 1 else "network", given or SIZES)
