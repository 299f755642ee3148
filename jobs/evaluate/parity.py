"""Compare the scores of a version's ONNX graph with those of the network that it was exported from."""

from __future__ import annotations

from typing import Any

from cluster.registry import ModelVersion
from cluster.runtime import Task
from cluster.runtime.device_choice import Hardware
from cluster.runtime.loader import read_file
from cluster.runtime.signature import NETWORK_FILE, ONNX_FILE, WEIGHTS_FILE
from cluster.security.keys.store import KeyStore
from jobs.evaluate.rows import ScoredRows
from jobs.parity import compare_scores


def measure_parity(version: ModelVersion, store: KeyStore, rows: ScoredRows) -> dict[str, Any]:
    """Return how far the graph's scores differ from the network's; empty if the version does not have both.

    Args:
        version: The version.
        store: Key store with the model's key.
        rows: Rows with the scores of the graph. The graph can be int8; the network is float32.
    """
    if not {ONNX_FILE, NETWORK_FILE, WEIGHTS_FILE} <= version.files.keys():
        return {}
    from cluster.runtime.torch_engine import TorchEngine  # imports torch

    shape, weights = (read_file(version, name, store) for name in (NETWORK_FILE, WEIGHTS_FILE))
    network = TorchEngine(shape, weights, hardware=Hardware(num_threads=2)).scores(rows.matrix)
    signature = rows.predictions.signature
    return compare_scores(
        network,
        rows.predictions.scores,
        precision=signature.precision,
        is_number=signature.task is Task.regression,
    )
