"""Training processes without Ray: one process group, in which several fits run one after another."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.train.config import CheckpointConfig
from jobs.train.network.engine import consolidated_weights
from jobs.train.network.loop import LoopState, Rank, StepMetrics, run_loop
from jobs.train.network.plan import LoopConfig
from jobs.train.network.saver import NoCheckpoints, Saver
from jobs.train.run.files import RunFiles

TIMEOUT_S = 550.0
Fit = Callable[[Rank], Any]


def run_group(fits: Sequence[Fit], *, workers: int, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Run each fit on all processes of a new group, one after another, and return the results of rank 0."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawn.Process(target=_run_rank, args=(fits, Rank(rank=rank, workers=workers), folder))
            for rank in range(workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * workers
        # Files and no queue: a process that writes more than 64 KiB to a queue waits until they are read.
        contents = [(Path(folder) / f"{number}.result").read_bytes() for number in range(len(fits))]
        return [pickle.loads(content) for content in contents]  # noqa: S301 (our own process wrote it)


def _run_rank(fits: Sequence[Fit], rank: Rank, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank.rank)}
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(f"{folder}/store", rank.workers),  # type: ignore[attr-defined]
        rank=rank.rank,
        world_size=rank.workers,
    )
    for number, fit in enumerate(fits):
        result = fit(rank)
        if rank.rank == 0:
            (Path(folder) / f"{number}.result").write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()


class Curve:
    """A fit without checkpoints. Its result is the training loss of each step, and the last weights."""

    def __init__(self, config: LoopConfig) -> None:
        self.config = config

    def __call__(self, rank: Rank) -> dict[str, Any]:
        observer = _Recorder()
        run_loop(self.config, rank, observer)
        return {"losses": observer.losses, "weights": observer.weights}


class _Recorder(NoCheckpoints):
    def __init__(self) -> None:
        super().__init__(lambda metrics: None)
        self.losses: list[float] = []
        self.weights: dict[str, Any] = {}

    def log(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.values["training_loss"])

    def after_epoch(self, engine: Any, state: LoopState, metrics: StepMetrics, *, is_best: bool) -> None:
        self.weights = {name: value.numpy() for name, value in consolidated_weights(engine).items()}


class SavedRun:
    """A run with checkpoints. Its result is where it continued, the losses of its epochs, and the last weights.

    With `stopped_at`, all ranks stop after so many steps, and the result is None.
    """

    def __init__(
        self,
        config: LoopConfig,
        files: RunFiles,
        checkpoint: CheckpointConfig,
        *,
        stopped_at: int | None = None,
    ) -> None:
        self.config, self.files, self.checkpoint, self.stopped_at = config, files, checkpoint, stopped_at

    def __call__(self, rank: Rank) -> dict[str, Any] | None:
        saver = _StoppedSaver(self.files, self.checkpoint, rank, stopped_at=self.stopped_at)
        try:
            run_loop(self.config, rank, saver)
        except _Stopped:
            return None
        saver.close()
        return {"continued_at": saver.continued_at, "losses": saver.losses, "weights": saver.weights}


class HalfWritten:
    """Leaves a part of a checkpoint that is newer than all others, as a killed upload does."""

    def __init__(self, files: RunFiles) -> None:
        self.files = files

    def __call__(self, rank: Rank) -> None:
        if rank.rank == 0:
            newest = self.files.checkpoints()[0]
            name = newest._replace(step=newest.step + 1, attempt="ffffffff")
            self.files.write(f"checkpoints/{name.text()}/rank-0", b"half of a checkpoint")
        torch.distributed.barrier()


class _Stopped(Exception):
    """All ranks stop here."""


class _StoppedSaver(Saver):
    def __init__(self, *arguments: Any, stopped_at: int | None) -> None:
        super().__init__(*arguments)
        self._stopped_at, self._steps = stopped_at, 0
        self.continued_at: tuple[int, int] | None = None
        self.losses: list[dict[str, float]] = []
        self.weights: dict[str, Any] = {}

    def restore(self, engine: Any) -> LoopState | None:
        state = super().restore(engine)
        self.continued_at = None if state is None else (state.epoch, state.step)
        return state

    def after_step(self, engine: Any, state: LoopState) -> None:
        super().after_step(engine, state)
        self._steps += 1
        if self._steps == self._stopped_at:
            self.close()
            raise _Stopped

    def after_epoch(self, engine: Any, state: LoopState, metrics: StepMetrics, *, is_best: bool) -> None:
        super().after_epoch(engine, state, metrics, is_best=is_best)
        self.losses.append(metrics.values)
        self.weights = {name: value.numpy() for name, value in consolidated_weights(engine).items()}


def checkpoint_bytes(folder: Path) -> bytes:
    """Return the content of all files below a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
