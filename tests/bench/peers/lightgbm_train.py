"""A fit of trees as users of LightGBM would write it. It reads plain Parquet into memory.

    python lightgbm_train.py WORK.pickle

`tests/bench/train.py` writes `WORK.pickle`, with the settings and the split of Falaj's own run.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def read(path: str, columns: dict[str, list[str]]) -> tuple[Any, Any]:
    """Return the inputs, float32 [rows, columns], and the target."""
    table = pq.read_table(path)
    matrix = np.empty((table.num_rows, len(columns)), np.float32)
    for position, (name, categories) in enumerate(columns.items()):
        column = table[name]
        if categories:
            column = pc.index_in(column.cast(pa.string()), value_set=pa.array(categories))
        matrix[:, position] = column.to_numpy()
    return matrix, table["y"].to_numpy()


def main(path: str) -> None:
    """Fit, and print every tenth round."""
    work: dict[str, Any] = pickle.loads(Path(path).read_bytes())  # noqa: S301 (the benchmark wrote it)
    categorical = [position for position, values in enumerate(work["columns"].values()) if values]
    train = lightgbm.Dataset(
        *read(work["fit"], work["columns"]), categorical_feature=categorical, params=work["settings"]
    )
    validation = lightgbm.Dataset(*read(work["validation"], work["columns"]), reference=train)

    def show(env: Any) -> None:
        completed = env.iteration + 1
        if completed == 1 or completed % work["every"] == 0:
            print(f"round {completed} of {work['rounds']}", flush=True)

    booster = lightgbm.train(
        work["settings"], train, num_boost_round=work["rounds"], valid_sets=[validation], callbacks=[show]
    )
    booster.save_model(work["model"])


if __name__ == "__main__":
    main(sys.argv[1])
