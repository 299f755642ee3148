"""Compare the scores of a version's ONNX graph with those of the network that it was exported from."""

from __future__ import annotations

from typing import Any

from cluster.registry import ModelVersion
from cluster.runtime.device_choice import Hardware
from cluster.runtime.encoding import Matrix
from cluster.runtime.loader import read_file
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import NETWORK_FILE, ONNX_FILE, WEIGHTS_FILE, Precision
from cluster.security.keys.store import KeyStore
from jobs.parity import compare_scores


def measure_parity(
    version: ModelVersion,
    store: KeyStore,
    matrix: Matrix,
    scores: Scores,
    *,
    precision: Precision,
    is_number: bool,
) -> dict[str, Any]:
    """Return how far the graph's scores differ from the network's; empty if the version has not both.

    Args:
        version: The version.
        store: Key store with the model's key.
        matrix: Encoded rows.
        scores: Scores of the graph for these rows.
        precision: Precision of the graph. The network's is float32.
        is_number: Whether a score is a number and not a probability. Then the range of the scores is the measure.
    """
    if not {ONNX_FILE, NETWORK_FILE, WEIGHTS_FILE} <= version.files.keys():
        return {}
    from cluster.runtime.torch_engine import TorchEngine  # imports torch

    shape, weights = (read_file(version, name, store) for name in (NETWORK_FILE, WEIGHTS_FILE))
    network = TorchEngine(shape, weights, hardware=Hardware(num_threads=2)).scores(matrix)
    return compare_scores(network, scores, precision=precision, is_number=is_number)
