"""Chooses the device and the engine for a model version, once, when the version is loaded.

A network runs in torch, built from its shape and weights, if the replica has a GPU and torch finds it. Everything else
runs in ONNX Runtime (a graph) or in LightGBM (trees). ONNX Runtime uses the GPU if it was built for it, but a version
that was registered (and evaluated) as int8 stays on the CPU. So do trees.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Collection
from dataclasses import dataclass

from cluster.errors import RefusedError
from cluster.runtime.signature import LIGHTGBM_FILE, NETWORK_FILE, ONNX_FILE, WEIGHTS_FILE, Precision

LOG = logging.getLogger("falaj.runtime")
CPU, CUDA = "cpu", "cuda:0"
"""Torch's names of the devices. Ray shows a replica only the replica's own GPU, so that GPU is always the first."""


class Runner(enum.Enum):
    """Engine that runs a model."""

    lightgbm = "lightgbm"
    onnx = "onnx"
    torch = "torch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Hardware that one replica may use."""

    num_threads: int = 1
    """CPU threads for one prediction."""
    device: str = CPU
    """Torch's name of the device."""
    memory_share: float = 1.0
    """Share of the GPU's memory that torch may use. Ray reserves fractions of a GPU, but does not enforce them."""


def replica_hardware(*, num_cpus: float, num_gpus: float, has_cuda: bool) -> Hardware:
    """Return the hardware that a replica with these resources may use.

    Args:
        num_cpus: Reserved CPUs. A replica with less than one CPU gets one thread.
        num_gpus: Reserved GPUs. A replica with a fraction of a GPU gets that share of the GPU's memory.
        has_cuda: Whether torch finds a GPU. A test cluster has only logical GPUs, which torch does not find.
    """
    threads = max(1, int(num_cpus))
    if num_gpus > 0 and has_cuda:
        return Hardware(num_threads=threads, device=CUDA, memory_share=float(min(num_gpus, 1.0)))
    return Hardware(num_threads=threads)


def find_hardware(*, num_cpus: float, num_gpus: float) -> Hardware:
    """Return the hardware that this process may use. If a GPU is reserved, check whether torch finds it."""
    has_cuda = False
    if num_gpus > 0:
        import torch  # takes seconds, so it is imported only with a reserved GPU

        has_cuda = torch.cuda.is_available()
        if not has_cuda:
            LOG.warning("%s of a GPU is reserved, but torch finds no GPU: models run on the CPU", num_gpus)
    return replica_hardware(num_cpus=num_cpus, num_gpus=num_gpus, has_cuda=has_cuda)


def choose_runner(files: Collection[str], precision: Precision, hardware: Hardware) -> Runner:
    """Return the engine that runs a model with these files.

    Raises:
        RefusedError: There is neither an ONNX file nor a LightGBM file, or there are both.
    """
    match ONNX_FILE in files, LIGHTGBM_FILE in files:
        case True, False:
            has_network = NETWORK_FILE in files and WEIGHTS_FILE in files
            on_gpu = hardware.device != CPU and precision is Precision.float32
            return Runner.torch if has_network and on_gpu else Runner.onnx
        case False, True:
            return Runner.lightgbm
        case _:
            raise RefusedError(
                f"A model folder needs exactly one of {ONNX_FILE} and {LIGHTGBM_FILE}. Remove or add a file."
            )
