"""Predicts single rows fast, with the C functions that LightGBM has for single rows.

In each call, `Booster.predict` copies its parameters and creates a predictor. That takes eight times as long as the
trees of a small model. `LGBM_BoosterPredictForMatSingleRowFastInit` (LightGBM's `c_api.h`) does both only once. The
results are bit-identical.
"""

from __future__ import annotations

import ctypes
import threading
import weakref

import lightgbm as lgb
import numpy as np

from cluster.runtime.encoding import Matrix
from cluster.runtime.predictions import Scores

_NORMAL, _FLOAT32, _FIRST, _ALL = 0, 0, 0, -1
"""Constants of `c_api.h`: type of prediction (the objective's scores), matrix type, first tree, number of trees."""


class RowPredictor:
    """Predicts single rows with a booster. It keeps a reference to the booster, and is thread-safe."""

    def __init__(self, booster: lgb.Booster, *, num_threads: int = 1) -> None:
        self._booster = booster
        self._library = lgb.basic._LIB
        self._num_scores = booster.num_model_per_iteration()
        self._lock = threading.Lock()  # the C function has one buffer for all callers
        self._config = ctypes.c_void_p()
        self._check(
            self._library.LGBM_BoosterPredictForMatSingleRowFastInit(
                booster._handle,
                ctypes.c_int(_NORMAL),
                ctypes.c_int(_FIRST),
                ctypes.c_int(_ALL),
                ctypes.c_int(_FLOAT32),
                ctypes.c_int32(booster.num_feature()),
                f"num_threads={num_threads}".encode(),
                ctypes.byref(self._config),
            )
        )
        weakref.finalize(self, self._library.LGBM_FastConfigFree, self._config)

    def scores(self, matrix: Matrix) -> Scores:
        """Return the scores of one encoded row, float32 [1, inputs]: [1], or [1, classes] for a multiclass model."""
        row = np.ascontiguousarray(matrix, dtype=np.float32)
        result = np.empty(self._num_scores)
        count = ctypes.c_int64()
        with self._lock:
            self._check(
                self._library.LGBM_BoosterPredictForMatSingleRowFast(
                    self._config,
                    ctypes.c_void_p(row.ctypes.data),
                    ctypes.byref(count),
                    ctypes.c_void_p(result.ctypes.data),
                )
            )
        return result.reshape(1, -1) if self._num_scores > 1 else result

    def _check(self, failed: int) -> None:
        if failed:
            raise lgb.basic.LightGBMError(self._library.LGBM_GetLastError().decode())
