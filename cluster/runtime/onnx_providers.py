"""Chooses where ONNX Runtime runs a graph: on a GPU if the replica has one and ONNX Runtime was built for it.

The package `onnxruntime-gpu` has CUDAExecutionProvider, and `onnxruntime` has not. An int8 graph stays on the CPU,
because it was evaluated there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cluster.runtime.device_choice import CPU, LOG, Hardware
from cluster.runtime.signature import Precision

CUDA_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"


def choose_providers(
    hardware: Hardware, precision: Precision, *, available: Collection[str], gpu_bytes: int
) -> list[Any]:
    """Return ONNX Runtime's providers, the preferred one first.

    Args:
        hardware: Hardware that the replica may use.
        precision: Precision of the graph.
        available: Providers of the installed ONNX Runtime.
        gpu_bytes: Memory of the GPU.
    """
    if hardware.device == CPU or precision is not Precision.float32 or CUDA_PROVIDER not in available:
        return [CPU_PROVIDER]
    options = {
        "device_id": 0,
        # The limit is for ONNX Runtime's arena. CUDA itself needs some hundred megabytes more.
        "gpu_mem_limit": int(gpu_bytes * hardware.memory_share),
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [(CUDA_PROVIDER, options), CPU_PROVIDER]


def find_providers(hardware: Hardware, precision: Precision, *, available: Collection[str]) -> list[Any]:
    """Return the providers for this process. If the GPU is used, the size of its memory is read with torch."""
    if choose_providers(hardware, precision, available=available, gpu_bytes=0) == [CPU_PROVIDER]:
        return [CPU_PROVIDER]
    import torch  # takes seconds, so it is imported only if the GPU is used

    total = int(torch.cuda.get_device_properties(hardware.device).total_memory)
    return choose_providers(hardware, precision, available=available, gpu_bytes=total)


def report_provider(used: str, hardware: Hardware, precision: Precision) -> None:
    """Log which provider runs the graph. Without a reserved GPU, it is always the CPU, and nothing is logged.

    ONNX Runtime itself only falls back to the CPU if CUDA's libraries are missing or do not fit.
    """
    if hardware.device == CPU:
        return
    if used == CUDA_PROVIDER:
        LOG.warning("the ONNX graph runs on the GPU (%s), within %.0f%%", used, hardware.memory_share * 100)
    elif precision is not Precision.float32:
        LOG.warning("a GPU is reserved, but an int8 graph runs on the CPU (%s)", used)
    else:
        LOG.warning(
            "a GPU is reserved, but the ONNX graph runs on the CPU (%s): onnxruntime-gpu or a CUDA library is missing",
            used,
        )
