"""What a replica may run on, and which engine runs a version there: decided once, when it is loaded.

A network runs in torch, from its shape and weights, where the replica was given a GPU and torch finds it. Anything else
runs on the CPU: an ONNX graph in ONNX Runtime, trees in LightGBM. A version that was registered as int8 was judged as
int8, so it stays on the CPU whatever there is; so does one that was registered without its network's shape.
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
"""Devices, as torch calls them; Ray lets a replica see no GPU but its own, which is the first then."""


class Runner(enum.Enum):
    """What runs a model."""

    lightgbm = "lightgbm"
    onnx = "onnx"
    torch = "torch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What one replica may use."""

    num_threads: int = 1
    """CPU threads of one prediction."""
    device: str = CPU
    """As torch calls it."""
    memory_share: float = 1.0
    """Of the GPU's memory; Ray's fraction of a GPU is a matter of counting and keeps nobody within it."""


def replica_hardware(*, num_cpus: float, num_gpus: float, has_cuda: bool) -> Hardware:
    """What a replica with these resources may use.

    Args:
        num_cpus: that it reserves; a part of one is one thread.
        num_gpus: that it reserves; a part of one is that part of its memory.
        has_cuda: whether torch finds a GPU. A logical one, as a test cluster may have, is none.
    """
    threads = max(1, int(num_cpus))
    if num_gpus > 0 and has_cuda:
        return Hardware(num_threads=threads, device=CUDA, memory_share=float(min(num_gpus, 1.0)))
    return Hardware(num_threads=threads)


def find_hardware(*, num_cpus: float, num_gpus: float) -> Hardware:
    """What this process may use, of what is there."""
    has_cuda = False
    if num_gpus > 0:
        import torch  # takes seconds, and only who has a GPU needs to know

        has_cuda = torch.cuda.is_available()
        if not has_cuda:
            LOG.warning("%s of a GPU is reserved here, and torch finds none: models run on the CPU", num_gpus)
    return replica_hardware(num_cpus=num_cpus, num_gpus=num_gpus, has_cuda=has_cuda)


def choose_runner(files: Collection[str], precision: Precision, hardware: Hardware) -> Runner:
    """What runs a model of these files.

    Raises:
        RefusedError: they are not those of one model.
    """
    match ONNX_FILE in files, LIGHTGBM_FILE in files:
        case True, False:
            whole = NETWORK_FILE in files and WEIGHTS_FILE in files
            on_gpu = hardware.device != CPU and precision is Precision.float32
            return Runner.torch if whole and on_gpu else Runner.onnx
        case False, True:
            return Runner.lightgbm
        case _:
            raise RefusedError(
                f"A model folder needs either {ONNX_FILE} or {LIGHTGBM_FILE}, not both or none."
            )
