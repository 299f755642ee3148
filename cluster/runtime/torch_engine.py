"""Runs the tabular network in torch, from its shape and its weights: on a GPU, or on CPU to be held against ONNX."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from cluster.errors import RefusedError
from cluster.runtime.encoding import Matrix
from cluster.runtime.hardware import CPU, Hardware
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import NETWORK_FILE, WEIGHTS_FILE
from cluster.runtime.tabular_network import NetworkShape, ScoringNetwork, TabularNetwork


class TorchEngine:
    """A tabular network on a device."""

    def __init__(self, shape: bytes, weights: bytes, *, hardware: Hardware) -> None:
        """Build the network and move it to its device.

        Args:
            shape: `network.json`.
            weights: `model.safetensors`.
            hardware: the device, and how much of its memory this process may take.

        Raises:
            RefusedError: they make no network.
        """
        try:
            network = TabularNetwork(NetworkShape(**json.loads(shape)))
            network.load_state_dict(load(weights))
        except (SafetensorError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise RefusedError(
                f"{NETWORK_FILE} and {WEIGHTS_FILE} make no network: {error}. Train the version again."
            ) from error
        self._device = torch.device(hardware.device)
        if hardware.device == CPU:
            torch.set_num_threads(hardware.num_threads)
        elif hardware.memory_share < 1:
            # A replica that takes more than its share fails alone, and not its neighbours on the same GPU.
            torch.cuda.set_per_process_memory_fraction(hardware.memory_share, self._device)
        self._network = ScoringNetwork(network).to(self._device)
        self._num_inputs = len(network.shape.categorical) + len(network.shape.numeric)

    @property
    def num_inputs(self) -> int:
        return self._num_inputs

    def scores(self, matrix: Matrix) -> Scores:
        with torch.inference_mode():
            found = self._network(torch.from_numpy(matrix).to(self._device)).cpu().numpy()
        return np.asarray(found, dtype=np.float64)
