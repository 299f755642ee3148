"""DeepSpeed's engine of one process: its configuration, learning rate, state and weights.

DeepSpeed is imported inside the functions that need it, because its import compiles code and probes the hardware.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cluster.errors import ConfigError
from cluster.security.encryption.scratch import memory_folder, scratch_directory
from cluster.storage import project_root
from jobs.train.network.plan import LoopConfig

Parts = dict[str, bytes]
"""Files of one rank's state, by name."""
_TAG, _UNIVERSAL = "state", "universal"


def start_engine(config: LoopConfig, *, workers: int) -> Any:
    """Build the network and return DeepSpeed's engine. All ranks call this together, and start with equal weights."""
    import deepspeed

    if config.device == "cpu":
        # DeepSpeed's shared-memory all-reduce is only for inference, and compiling it takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    network = importlib.import_module(config.module).build(config.signature, config.parameters)
    if config.deepspeed.activation_checkpointing:
        checkpoint_activations(network)
    engine, *_ = deepspeed.initialize(
        model=network,
        model_parameters=[parameter for parameter in network.parameters() if parameter.requires_grad],
        config=deepspeed_config(config, workers=workers),
        dist_init_required=False,
    )
    return engine


def deepspeed_config(config: LoopConfig, *, workers: int) -> dict[str, Any]:
    """Return the configuration for DeepSpeed."""
    parameters, settings = config.parameters, config.deepspeed
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    result = {
        "train_micro_batch_size_per_gpu": config.steps.batch_rows
        // (workers * settings.gradient_accumulation),
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "gradient_clipping": settings.gradient_clipping,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": parameters.learning_rate,
                "weight_decay": parameters.weight_decay,
                "torch_adam": settings.torch_adam,
            },
        },
        "steps_per_print": 10**9,
    }
    if config.device == "cuda":
        # Weights and inputs stay in float32: bfloat16 cannot represent the numbers of more than 256 categories.
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return result


def checkpoint_activations(network: Any) -> None:
    """Compute the activations of the network's blocks again in the backward pass, instead of keeping them in memory.

    Raises:
        ConfigError: The network has no blocks: neither a `ModuleList` nor a method of its own.
    """
    for name in (
        "activation_checkpointing_enable",
        "gradient_checkpointing_enable",
    ):  # of Hugging Face models
        if hasattr(network, name):
            getattr(network, name)()
            return
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    lists = [module for module in network.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise ConfigError(
            "deepspeed.activation_checkpointing=true needs a network whose blocks are in a torch.nn.ModuleList. Set "
            "deepspeed.activation_checkpointing=false."
        )
    for blocks in lists:
        for index, block in enumerate(blocks):
            blocks[index] = checkpoint_wrapper(block)


def learning_rate(peak: float, progress: float, *, warmup_share: float) -> float:
    """Return the learning rate: a linear warm-up, then half a cosine down to zero.

    Args:
        peak: Learning rate at the end of the warm-up.
        progress: Completed share of all steps, 0 to 1.
        warmup_share: Share of all steps in which the learning rate rises.
    """
    if progress < warmup_share:
        return peak * (progress / warmup_share + 0.01) / 1.01
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup_share) / (1 - warmup_share)))


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of all weights."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def consolidated_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return all weights of the network on the CPU, whatever the ZeRO stage is. All ranks must call this together."""
    from deepspeed import zero

    with zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
        return {
            name: value.detach().cpu().clone().contiguous()
            for name, value in engine.module.state_dict().items()
        }


def engine_state(engine: Any) -> Parts:
    """Return the files of this rank's part of the state, without writing any. All ranks must call this together."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    parts: Parts = {}

    class InMemory(TorchCheckpointEngine):  # type: ignore[misc]
        def save(self, state_dict: Any, path: str) -> None:
            content = io.BytesIO()
            torch.save(state_dict, content)
            parts[Path(path).name] = content.getvalue()

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            pass

    used = engine.checkpoint_engine
    engine.checkpoint_engine = InMemory()
    copy_script, engine._copy_recovery_script = engine._copy_recovery_script, lambda path: None
    try:
        engine.save_checkpoint("memory", tag=_TAG, save_latest=False)
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = used, copy_script
    return parts


def load_engine_state(engine: Any, parts: Parts, *, is_resharded: bool = False) -> None:
    """Load the state that `engine_state` returned, of all ranks. It must be authentic, because it has pickles.

    Args:
        engine: Engine of this rank.
        parts: Files of all ranks.
        is_resharded: Whether another number of workers has saved the state. ZeRO 1 to 3 then load it through
            DeepSpeed's universal checkpoint. With ZeRO 0, rank 0's state is the whole state.
    """
    with scratch_directory(scratch_parent()) as folder:
        (folder / _TAG).mkdir()
        for name, content in parts.items():
            (folder / _TAG / name).write_bytes(content)
        if not (is_resharded and engine.zero_optimization()):
            engine.load_checkpoint(str(folder), tag=_TAG)
            return
        _convert(folder / _TAG, folder / _UNIVERSAL)
        engine._config.load_universal_checkpoint = True
        try:
            engine.load_checkpoint(str(folder), tag=_UNIVERSAL)
        finally:
            engine._config.load_universal_checkpoint = False


def _convert(source: Path, target: Path) -> None:
    """Convert a state into a universal checkpoint, as DeepSpeed's `ds_to_universal.py` does. It prints its progress."""
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir()
    arguments = SimpleNamespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


def scratch_parent() -> Path:
    """Return the folder for temporary plaintext: in memory, or this user's folder if there is too little memory."""
    return memory_folder(otherwise=project_root() / ".falaj" / f"runs-{os.geteuid()}")
