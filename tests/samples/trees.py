"""A few trees, fitted to an arbitrary target, as a folder of model files."""

from __future__ import annotations

from pathlib import Path

import lightgbm
import numpy as np

from cluster.runtime import ModelSignature, Task
from cluster.runtime.signature import LIGHTGBM_FILE, SIGNATURE_FILE
from tests.samples.network import rows

OBJECTIVES = {Task.binary: "binary", Task.multiclass: "multiclass", Task.regression: "regression"}


def write_trees(folder: Path, signature: ModelSignature, *, rounds: int = 5, num_leaves: int = 8) -> None:
    """Fit the trees, and write the same files as training."""
    folder.mkdir(parents=True)
    matrix = rows(signature, 500)
    known = np.nan_to_num(matrix).sum(axis=1)
    classes = max(2, signature.num_scores)
    target = (
        known if signature.task is Task.regression else np.argsort(np.argsort(known)) * classes // len(known)
    )
    settings = {"objective": OBJECTIVES[signature.task], "verbosity": -1, "num_threads": 1}
    settings |= {"num_leaves": num_leaves, "min_data_in_leaf": 5}
    if signature.task is Task.multiclass:
        settings["num_class"] = signature.num_scores
    data = lightgbm.Dataset(matrix, target.astype(float), categorical_feature=signature.categorical)
    booster = lightgbm.train(settings, data, num_boost_round=rounds)
    (folder / LIGHTGBM_FILE).write_text(booster.model_to_string())
    (folder / SIGNATURE_FILE).write_text(signature.to_json())
