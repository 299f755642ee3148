"""Save and restore the state of a network's run, on every rank.

A save copies the state in memory. A thread encrypts and uploads it while the training goes on. Rank 0 decides when a
checkpoint is due, and tells the other ranks, because a save is a collective operation.
"""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors.torch import save

from jobs.train.config import CheckpointConfig
from jobs.train.network.elastic import Resized
from jobs.train.network.engine import Parts, consolidated_weights, engine_state, load_engine_state
from jobs.train.network.loop import LoopState, Rank, StepMetrics, random_states, set_random_states
from jobs.train.run.files import (
    CheckpointName,
    RunFiles,
    best_path,
    find_checkpoint,
    read_checkpoint,
    remove_old,
    write_manifest,
)

DECIDE_STEPS = 8
"""After so many steps, rank 0 tells the other ranks whether a checkpoint is due by time."""
UPLOAD_TIMEOUT_S = 600.0
"""Longest time in seconds that rank 0 waits for the uploads of the other ranks."""
_POLL_S = 0.1
Report = Callable[[StepMetrics, bool], None]
"""Called on rank 0 with metrics, and whether they are those of a finished epoch."""


class Saver:
    """Observer of a training loop that keeps checkpoints and metrics."""

    def __init__(
        self,
        files: RunFiles,
        config: CheckpointConfig,
        rank: Rank,
        *,
        report: Report = lambda metrics, is_epoch: None,
        warn: Callable[[str], None] = print,
        ask_draining: Callable[[], bool] = lambda: False,
        has_room: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare the saver of one rank.

        Args:
            files: Files of the run.
            config: When to save, and what to keep.
            rank: Place of this process.
            report: Gets the metrics on rank 0.
            warn: Gets warnings on rank 0.
            ask_draining: Returns whether a node of the run will end soon. All ranks call it together.
            has_room: Returns on rank 0 whether there is room for more workers.
        """
        self._files, self._config, self._rank = files, config, rank
        self._report, self._warn, self._ask_draining, self._has_room = report, warn, ask_draining, has_room
        self._saved_at = self._asked_at = time.monotonic()
        self._is_draining = self._is_resizing = False
        self._metrics: list[StepMetrics] = []
        self._upload = _Upload()

    def restore(self, engine: Any) -> LoopState | None:
        """Load the newest complete checkpoint.

        If it has another number of workers, the random generators keep the states that the seed gave them.
        """
        found: list[CheckpointName | None] = [None]
        checkpoint = None
        if self._rank.rank == 0:
            checkpoint, warnings = find_checkpoint(self._files)
            for warning in warnings:
                self._warn(warning)
            found = [None if checkpoint is None else checkpoint.name]
        torch.distributed.broadcast_object_list(found, src=0)
        if found[0] is None:
            return None
        if checkpoint is None:
            checkpoint = read_checkpoint(self._files, found[0])
        ranks = [
            pickle.loads(checkpoint.parts.pop(_rank_part(rank)))  # noqa: S301 (it is authentic)
            for rank in range(checkpoint.workers)
        ]
        if checkpoint.workers == self._rank.workers:
            own = ranks[self._rank.rank]
            load_engine_state(engine, checkpoint.parts)
            set_random_states(own["random"])
            return LoopState(**own["state"])
        load_engine_state(engine, checkpoint.parts, is_resharded=True)
        return _divided(LoopState(**ranks[0]["state"]), [one["state"]["loss_sum"] for one in ranks])

    def after_step(self, engine: Any, state: LoopState) -> None:
        """Save a checkpoint if one is due.

        Raises:
            Resized: There is room for more workers. The checkpoint is complete.
        """
        if self._is_due(state, device=engine.device):
            self._save(engine, state, weights=None)
        if self._is_resizing:
            self.close()
            raise Resized

    def after_epoch(self, engine: Any, state: LoopState, metrics: StepMetrics, *, is_best: bool) -> None:
        """Save a checkpoint and, if they are the best, the weights."""
        if self._rank.rank == 0:
            self._metrics.append(metrics)
            self._report(metrics, True)
        self._save(engine, state, weights=consolidated_weights(engine) if is_best else None)

    def log(self, metrics: StepMetrics) -> None:
        """Record metrics. They are written with the next checkpoint."""
        if self._rank.rank == 0:
            self._metrics.append(metrics)
            self._report(metrics, False)

    def close(self) -> None:
        """Wait until the last checkpoint is complete. Errors of its upload are raised here."""
        self._upload.wait()

    def _is_due(self, state: LoopState, *, device: torch.device) -> bool:
        steps = self._config.every_steps
        is_due = steps is not None and state.step % steps == 0
        if state.step % DECIDE_STEPS == 0:  # also if it is due, because rank 0 must ask for room
            is_due |= self._decide(device)
        return is_due

    def _decide(self, device: torch.device) -> bool:
        """Return whether a checkpoint is due by time, or because the run must end or grow. All ranks call this."""
        seconds = self._config.every_s
        now = time.monotonic()
        is_late = seconds is not None and now - self._saved_at >= seconds
        must_ask = now - self._asked_at >= self._config.watch_s
        is_resizing = must_ask and self._rank.rank == 0 and self._has_room()
        decisions = torch.tensor([is_late, must_ask, is_resizing], dtype=torch.uint8, device=device)
        torch.distributed.broadcast(decisions, src=0)
        is_due, must_ask, self._is_resizing = map(bool, decisions.tolist())
        is_due |= self._is_resizing
        if must_ask:
            self._asked_at = now
        if must_ask and not self._is_draining:
            self._is_draining = self._ask_draining()
            is_due |= self._is_draining
        return is_due

    def _save(self, engine: Any, state: LoopState, *, weights: dict[str, torch.Tensor] | None) -> None:
        self._upload.wait()
        names = [CheckpointName.new(epoch=state.epoch, step=state.step, best_epoch=state.best_epoch)]
        torch.distributed.broadcast_object_list(names, src=0)
        parts = engine_state(engine)
        own = {"state": asdict(state), "random": random_states()}
        parts[_rank_part(self._rank.rank)] = pickle.dumps(own)
        best = save(weights) if weights is not None and self._rank.rank == 0 else None
        metrics, self._metrics = self._metrics, []
        self._upload.start(lambda: self._write(names[0], parts, best, metrics))
        self._saved_at = time.monotonic()

    def _write(
        self, name: CheckpointName, parts: Parts, best: bytes | None, metrics: Sequence[StepMetrics]
    ) -> None:
        """Write this rank's files. Rank 0 also writes the files of the whole run, and the manifest last."""
        files, folder = self._files, f"checkpoints/{name.text()}"
        if best is not None:
            files.write(best_path(name.best_epoch), best)
        own = _rank_part(self._rank.rank)
        for part, content in parts.items():
            if part != own:
                files.write(f"{folder}/{part}", content)
        files.write(f"{folder}/{own}", parts[own])  # the last one: the others are complete
        if self._rank.rank != 0:
            return
        if metrics:
            content = json.dumps([asdict(entry) for entry in metrics]).encode()
            files.write(f"metrics/{name.epoch:06}-{name.step:09}", content)
        self._wait_for_ranks(folder)
        write_manifest(files, name, workers=self._rank.workers, parts=files.names(folder))
        remove_old(files, keep=self._config.keep)

    def _wait_for_ranks(self, folder: str) -> None:
        deadline = time.monotonic() + UPLOAD_TIMEOUT_S
        for rank in range(1, self._rank.workers):
            while not self._files.exists(f"{folder}/{_rank_part(rank)}"):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"Rank {rank} did not upload its part of {folder} within {UPLOAD_TIMEOUT_S:g} s."
                    )
                time.sleep(_POLL_S)


class _Upload:
    """One upload in a thread at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 (raised in `wait`)
                self._error = error

        self._thread = threading.Thread(target=run, name="upload", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the last upload, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


class NoCheckpoints:
    """Observer of a training loop that only passes the metrics of each epoch on."""

    def __init__(self, report: Callable[[StepMetrics], None]) -> None:
        self._report = report

    def restore(self, engine: Any) -> LoopState | None:
        """Start from the beginning."""
        return None

    def after_step(self, engine: Any, state: LoopState) -> None:
        """Do nothing."""

    def after_epoch(self, engine: Any, state: LoopState, metrics: StepMetrics, *, is_best: bool) -> None:
        """Report the metrics."""
        self._report(metrics)

    def log(self, metrics: StepMetrics) -> None:
        """Do nothing."""


def _divided(state: LoopState, loss_sums: Sequence[float]) -> LoopState:
    """Return the state for another number of workers. Each gets the mean of the sums of losses."""
    return replace(state, loss_sum=sum(loss_sums) / len(loss_sums))


def _rank_part(rank: int) -> str:
    return f"rank-{rank}"
