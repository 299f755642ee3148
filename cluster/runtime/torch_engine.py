"""Engine for the tabular network in torch, built from its shape and weights.

The engine runs on a GPU, or on the CPU for comparison with ONNX.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from cluster.errors import RefusedError
from cluster.runtime.device_choice import CPU, Hardware
from cluster.runtime.encoding import Matrix
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import NETWORK_FILE, WEIGHTS_FILE
from cluster.runtime.tabular_network import NetworkShape, ScoringNetwork, TabularNetwork


class TorchEngine:
    """A tabular network on a device."""

    def __init__(self, shape: bytes, weights: bytes, *, hardware: Hardware) -> None:
        """Build the network and move it to its device.

        Args:
            shape: Content of `network.json`.
            weights: Content of `model.safetensors`.
            hardware: The device, and the share of its memory that this process may use.

        Raises:
            RefusedError: Shape and weights are not a valid network.
        """
        try:
            network = TabularNetwork(NetworkShape(**json.loads(shape)))
            network.load_state_dict(load(weights))
        except (SafetensorError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise RefusedError(
                f"{NETWORK_FILE} and {WEIGHTS_FILE} are not a valid network: {error}. Train the version again."
            ) from error
        self._device = torch.device(hardware.device)
        if hardware.device == CPU:
            torch.set_num_threads(hardware.num_threads)
        elif hardware.memory_share < 1:
            # If a replica uses more than its share, only this replica fails, not the other replicas on the GPU.
            torch.cuda.set_per_process_memory_fraction(hardware.memory_share, self._device)
        self._network = ScoringNetwork(network).to(self._device)
        self._num_inputs = len(network.shape.categorical) + len(network.shape.numeric)

    @property
    def num_inputs(self) -> int:
        return self._num_inputs

    def scores(self, matrix: Matrix) -> Scores:
        with torch.inference_mode():
            scores = self._network(torch.from_numpy(matrix).to(self._device)).cpu().numpy()
        return np.asarray(scores, dtype=np.float64)
