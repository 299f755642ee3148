"""The training loop that users of torchrun and DeepSpeed would write. It reads plain Parquet, or text files.

    torchrun --nproc_per_node 2 torchrun_train.py WORK.pickle

`tests/bench/train.py` writes `WORK.pickle`, with the network, batch, split and DeepSpeed settings of Falaj's own run. A
rank reads its own row groups and shuffles the rows of several groups together. Each epoch ends with the validation loss
and a checkpoint. Rank 0 prints a line after each validation, as Falaj does.
"""

from __future__ import annotations

import importlib
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from jobs.train.network.engine import learning_rate

EVALUATION_ROWS, GROUPS_TOGETHER, KEEP = 4096, 2, 2
Rows = tuple[torch.Tensor, torch.Tensor]


class Tables:
    """Batches of the rows of two plain Parquet files."""

    def __init__(self, work: dict[str, Any], rank: int, workers: int) -> None:
        self._work, self._rank, self._workers = work, rank, workers
        self._file = pq.ParquetFile(work["fit"])

    def batches(self, epoch: int, rows: int) -> Iterator[Rows]:
        """Yield this rank's batches of one epoch."""
        draw = np.random.default_rng([epoch, self._rank])
        groups = draw.permutation(np.arange(self._rank, self._file.num_row_groups, self._workers))
        for first in range(0, len(groups), GROUPS_TOGETHER):
            table = self._file.read_row_groups(list(groups[first : first + GROUPS_TOGETHER]))
            inputs, target = self._encode(table)
            order = torch.from_numpy(draw.permutation(len(target)))
            for part in order.split(rows):
                if len(part) == rows:
                    yield inputs[part], target[part]

    def validation(self) -> Iterator[Rows]:
        """Yield this rank's part of the validation rows."""
        inputs, target = self._encode(pq.read_table(self._work["validation"]))
        rows = slice(self._rank, None, self._workers)
        yield from zip(inputs[rows].split(EVALUATION_ROWS), target[rows].split(EVALUATION_ROWS), strict=True)

    def _encode(self, table: pa.Table) -> Rows:
        matrix = np.empty((table.num_rows, len(self._work["columns"])), np.float32)
        for position, (name, categories) in enumerate(self._work["columns"].items()):
            column = table[name]
            if categories:
                column = pc.index_in(column.cast(pa.string()), value_set=pa.array(categories))
            matrix[:, position] = column.to_numpy()
        return torch.from_numpy(matrix), torch.from_numpy(table["y"].to_numpy().astype(np.float32))


class Texts:
    """Batches of packed rows of text files."""

    def __init__(self, work: dict[str, Any], rank: int, workers: int) -> None:
        self._work, self._rank, self._workers = work, rank, workers
        self._fit, self._validation = self._pack(work["fit"]), self._pack(work["validation"])

    def batches(self, epoch: int, rows: int) -> Iterator[Rows]:
        """Yield this rank's batches of one epoch."""
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(len(self._fit[1])))
        for part in order[self._rank :: self._workers].split(rows):
            if len(part) == rows:
                yield self._fit[0][part], self._fit[1][part]

    def validation(self) -> Iterator[Rows]:
        """Yield this rank's part of the validation rows."""
        rows = slice(self._rank, None, self._workers)
        inputs, target = self._validation
        yield from zip(inputs[rows].split(32), target[rows].split(32), strict=True)

    def _pack(self, paths: list[str]) -> Rows:
        """Return all rows: a token 256 and the bytes of each file, behind each other."""
        tokens = np.concatenate(
            [np.r_[256, np.frombuffer(Path(path).read_bytes(), np.uint8).astype(np.int64)] for path in paths]
        )
        length = self._work["length"]
        rows = (len(tokens) - 1) // length
        inputs, target = tokens[: rows * length], tokens[1 : rows * length + 1]
        return torch.from_numpy(inputs.reshape(rows, length)), torch.from_numpy(target.reshape(rows, length))


def main(path: str) -> None:
    """Train as one of the ranks."""
    work: dict[str, Any] = pickle.loads(Path(path).read_bytes())  # noqa: S301 (the benchmark wrote it)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else DeepSpeed compiles for a minute
    torch.set_num_threads(1)
    torch.manual_seed(0)
    deepspeed.init_distributed("gloo", verbose=False)
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    family = importlib.import_module(work["module"])
    network = family.build(work["signature"], work["parameters"])
    engine, *_ = deepspeed.initialize(
        model=network, model_parameters=network.parameters(), config=work["deepspeed"]
    )
    data = (Texts if "length" in work else Tables)(work, rank, workers)
    folder, total, step = Path(work["checkpoints"]), work["epochs"] * work["steps"], 0
    for epoch in range(work["epochs"]):
        engine.train()
        loss_sum = 0.0
        for _, (inputs, target) in zip(
            range(work["steps"]), data.batches(epoch, work["batch_rows"] // workers), strict=False
        ):
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(work["parameters"].learning_rate, step / total, warmup_share=0.1)
            loss = family.loss(engine(inputs), target, work["signature"])
            engine.backward(loss)
            engine.step()
            loss_sum, step = loss_sum + loss.item(), step + 1
        validation = _validation_loss(engine, family, work["signature"], data)
        if rank == 0:
            print(f"epoch {epoch + 1} of {work['epochs']}: {loss_sum / work['steps']:.4f} {validation:.4f}")
            sys.stdout.flush()
        engine.save_checkpoint(str(folder), tag=f"epoch{epoch}")
        if rank == 0:
            shutil.rmtree(folder / f"epoch{epoch - KEEP}", ignore_errors=True)
    print(f"rank {rank}: {step} steps", flush=True)


def _validation_loss(engine: Any, family: Any, signature: Any, data: Tables | Texts) -> float:
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for inputs, target in data.validation():
            loss = family.loss(engine.module(inputs), target, signature)
            total += torch.tensor([float(loss) * len(target), len(target)])
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


if __name__ == "__main__":
    main(sys.argv[-1])
