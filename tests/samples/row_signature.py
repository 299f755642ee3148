"""A network's signature, for tests that have no training set."""

from __future__ import annotations

import numpy as np

from cluster.runtime import ModelSignature, Task
from jobs.train.data import Dataset
from jobs.train.network.protocol import NetworkSignature


def row_signature(signature: ModelSignature, dataset: Dataset | None = None) -> NetworkSignature:
    """Return the signature of a network, with the statistics of a data set, or those of `tests.samples.network`."""
    columns, categorical = signature.matrix_columns, signature.categorical
    numeric = [place for place in range(signature.width) if place not in categorical]
    means, scales, target_mean, target_scale = [40.0] * len(numeric), [20.0] * len(numeric), 100.0, 10.0
    if dataset is not None:
        numbers = dataset.matrix[dataset.fit][:, numeric].astype(np.float64)
        means, scales = np.nanmean(numbers, 0).tolist(), np.nanstd(numbers, 0).tolist()
        target = dataset.target[dataset.fit]
        target_mean, target_scale = float(target.mean()), float(target.std())
    if signature.task is not Task.regression:
        target_mean, target_scale = 0.0, 1.0
    return NetworkSignature(
        task=signature.task,
        num_outputs=signature.num_scores,
        width=signature.width,
        categorical=categorical,
        cardinalities=[len(columns[place].categories or ()) for place in categorical],
        numeric=numeric,
        means=means,
        scales=scales,
        target_mean=target_mean,
        target_scale=target_scale,
    )
