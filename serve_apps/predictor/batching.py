"""Requests that are here at the same time, answered by one call of the model.

A replica answers in one event loop, so what arrived while the model was busy is read in one go after it, and is joined
without anybody having waited: a lone request is answered at once, and the more there are, the larger the batches get.
Where a longer wait is allowed (`max_wait_ms`), as many are waited for as came last time, but never longer.

`serve.batch` does the same with queues and tasks: measured for a model that costs nothing, it takes 98 µs a request
alone and 30 µs at 64 at once, where this takes 3 and 1.4 µs and a LightGBM model of 100 trees 22 µs; and it runs inside
a Serve replica alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.runtime import Model, Precision
from cluster.runtime.encoding import Matrix
from cluster.runtime.predictions import Predictions
from cluster.settings import BatchingConfig

Predict = Callable[[Matrix], Predictions]
PROBE_ROWS, PROBES = 8, 5
LEAST_SAVED_S = 50e-6
"""Of a request; what is less drowns in the rest of it: a network that saved 22 µs answered no more requests."""


def pays(predict: Predict, num_inputs: int, *, clock: Callable[[], float] = time.perf_counter) -> bool:
    """Whether a call for eight rows costs much less than eight calls, measured on rows of zeros."""
    one, eight = (_cost(predict, rows, num_inputs, clock) for rows in (1, PROBE_ROWS))
    return eight < PROBE_ROWS * one / 2 and one - eight / PROBE_ROWS > LEAST_SAVED_S


def _cost(predict: Predict, rows: int, num_inputs: int, clock: Callable[[], float]) -> float:
    """Seconds of the fastest call, which is the one that nothing else held up."""
    matrix = np.zeros((rows, num_inputs), dtype=np.float32)
    taken = []
    for _ in range(PROBES):
        started = clock()
        predict(matrix)
        taken.append(clock() - started)
    return min(taken)


def batches(model: Model, config: BatchingConfig) -> Batches | None:
    """What joins requests for a model; none where it would not pay, nor for an int8 one, whose activations are scaled
    over a whole call: what one request is answered would depend on whose came beside it, and could not be replayed."""
    if config.max_rows == 1 or model.signature.precision is Precision.int8:
        return None
    if not pays(model.predict_matrix, model.signature.width):
        return None
    return Batches(model.predict_matrix, max_rows=config.max_rows, max_wait_s=config.max_wait_ms / 1000)


@dataclass(frozen=True, slots=True)
class _Asked:
    matrix: Matrix
    answer: asyncio.Future[Predictions]


class Batches:
    """Joins the rows of requests.

    Args:
        predict: the model, for rows that are encoded.
        max_rows: of a batch; a single request may have more.
        max_wait_s: how long the first of a batch may wait for others, where others came last time.
    """

    def __init__(self, predict: Predict, *, max_rows: int, max_wait_s: float) -> None:
        self._predict = predict
        self._max_rows = max_rows
        self._max_wait_s = max_wait_s
        self._waiting: list[_Asked] = []
        self._num_rows = 0
        self._expected = 1
        self._due: asyncio.Handle | None = None

    async def predict(self, matrix: Matrix) -> Predictions:
        """What the model says of these rows; raises what it raises for them alone."""
        loop = asyncio.get_running_loop()
        if self._num_rows + len(matrix) > self._max_rows:
            self._answer()
        asked = _Asked(matrix, loop.create_future())
        self._waiting.append(asked)
        self._num_rows += len(matrix)
        self._plan(loop)
        return await asked.answer

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        if len(self._waiting) >= self._expected or not self._max_wait_s:
            # After all that is ready now, for which requests were already read.
            if self._due is None or isinstance(self._due, asyncio.TimerHandle):
                self._put_off(loop.call_soon(self._answer))
        elif self._due is None:
            self._put_off(loop.call_later(self._max_wait_s, self._answer))

    def _put_off(self, due: asyncio.Handle | None) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = due

    def _answer(self) -> None:
        self._put_off(None)
        waiting = [asked for asked in self._waiting if not asked.answer.done()]  # who went away is done
        self._waiting, self._num_rows, self._expected = [], 0, max(1, len(waiting))
        if waiting:
            _answer_all(self._predict, waiting)


def _answer_all(predict: Predict, waiting: Sequence[_Asked]) -> None:
    try:
        together = predict(np.concatenate([asked.matrix for asked in waiting]))
    except Exception as error:  # noqa: BLE001 (it belongs to whoever asked)
        if len(waiting) == 1:
            waiting[0].answer.set_exception(error)
        else:
            for asked in waiting:  # one of them may be to blame, and the others must not bear it
                _answer_all(predict, [asked])
        return
    first = 0
    for asked in waiting:
        last = first + len(asked.matrix)
        scores = together.scores[first:last]
        asked.answer.set_result(Predictions(signature=together.signature, scores=scores))
        first = last
