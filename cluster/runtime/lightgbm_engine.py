"""Engine for models in LightGBM's text format."""

from __future__ import annotations

import re

import lightgbm as lgb
import numpy as np

from cluster.errors import RefusedError
from cluster.runtime.encoding import Matrix
from cluster.runtime.lightgbm_rows import RowPredictor
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import LIGHTGBM_FILE


class LightGBMEngine:
    """A LightGBM text model."""

    def __init__(self, text: str, *, num_threads: int = 1) -> None:
        """Parse the text.

        Raises:
            RefusedError: The text is not a LightGBM model.
        """
        _validate(text)
        try:
            self._booster = lgb.Booster(model_str=text)
        except lgb.basic.LightGBMError as error:
            raise RefusedError(f"{LIGHTGBM_FILE} is not a LightGBM text model: {error}.") from error
        self._num_threads = num_threads
        self._row = RowPredictor(self._booster, num_threads=num_threads)

    @property
    def num_inputs(self) -> int:
        return int(self._booster.num_feature())

    def scores(self, matrix: Matrix) -> Scores:
        if len(matrix) == 1:
            return self._row.scores(matrix)
        return np.asarray(self._booster.predict(matrix, num_threads=self._num_threads), dtype=np.float64)

    def contributions(self, matrix: Matrix) -> Scores:
        """Return the SHAP values of a float32 matrix: [rows, inputs, raw scores per row], without the base value."""
        values = self._booster.predict(matrix, pred_contrib=True, num_threads=self._num_threads)
        by_score = np.asarray(values, dtype=np.float64).reshape(len(matrix), -1, self.num_inputs + 1)
        return by_score[:, :, :-1].transpose(0, 2, 1)


def _validate(text: str) -> None:
    """Validate the positions of all trees, because LightGBM aborts the process if a position is wrong."""
    header, blank, trees = text.partition("\n\n")
    sizes = re.search(r"^tree_sizes=([0-9 ]*)$", header, re.MULTILINE)
    if not text.startswith("tree\n") or not blank or sizes is None:
        raise RefusedError(f"{LIGHTGBM_FILE} is not a LightGBM text model. Train the version again.")
    position = 0
    for number, size in enumerate(sizes[1].split()):
        if not trees.startswith(f"Tree={number}\n", position):
            raise RefusedError(
                f"{LIGHTGBM_FILE} is damaged: tree {number} is not at the position in the header. Train the version "
                "again."
            )
        position += int(size)
    if not trees.startswith("end of trees", position):
        raise RefusedError(
            f"{LIGHTGBM_FILE} is damaged: its last tree is incomplete. Train the version again."
        )
