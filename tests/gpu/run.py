"""`make gpu`: measure one GPU without Ray, in at most eight minutes. `--tiny` only proves on a CPU that this works.

1. The ceiling: the rate of large bf16 matrix products in torch.
2. A training step of a decoder with 350 million weights and rows of 2,048 tokens in DeepSpeed: with and without the
   optimizer on the CPU (offload), and with and without activation checkpointing. Each has its peak memory, and the
   model-FLOPs utilisation: (6 · weights + 12 · layers · width · length) FLOPs a token, divided by the ceiling.
3. An FT-Transformer's ONNX graph in ONNX Runtime, on CUDA and on the CPU: time for a batch, and how far scores differ.

Part 1 and 2 need only torch and DeepSpeed. The result is printed as a table, and as one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from jobs.train.decoder.network import VOCABULARY, Decoder, DecoderShape

LIMIT_S = 480.0
"""No case is started after this time minus `RESERVE_S`."""
RESERVE_S = 60.0
NOT_MEASURED = "NOTHING WAS MEASURED ON A GPU: this run only shows that the script works on a CPU."


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Sizes of a run."""

    shape: DecoderShape
    length: int
    """Tokens of a row."""
    rows: int
    """Rows of a step."""
    warm_up: int
    steps: int
    matrix: int
    """Width of the matrices whose product is the ceiling."""
    batches: tuple[int, ...]
    """Batch sizes of the ONNX graph."""


FULL = Scale(
    shape=DecoderShape(width=1024, depth=28, heads=16, dropout=0.0),
    length=2048,
    rows=8,
    warm_up=3,
    steps=10,
    matrix=8192,
    batches=(1, 64, 1024),
)
TINY = Scale(
    shape=DecoderShape(width=64, depth=2, heads=2, dropout=0.0),
    length=32,
    rows=2,
    warm_up=1,
    steps=2,
    matrix=256,
    batches=(1, 8),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One way to make a step."""

    name: str
    offload: bool
    checkpointing: bool
    autocast: bool = False
    """Whether weights are float32 and only products are bf16, as in `jobs.train`. Otherwise weights are bf16."""


CASES = (
    Case(name="plain", offload=False, checkpointing=False),
    Case(name="autocast", offload=False, checkpointing=False, autocast=True),
    Case(name="activation checkpointing", offload=False, checkpointing=True),
    Case(name="offload", offload=True, checkpointing=False),
    Case(name="offload + activation checkpointing", offload=True, checkpointing=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Figures of one case."""

    case: str
    seconds: float
    """Median time of a step."""
    tokens_per_s: float
    teraflops: float
    """Model FLOPs; what checkpointing computes again is not counted."""
    utilisation: float
    """Share of the ceiling."""
    peak_gib: float | None
    """Peak of the GPU's memory that torch had allocated; None on a CPU."""
    loss: float


def main() -> int:
    """Run all parts, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny network, also on a CPU")
    parser.add_argument("--rows", type=int, help="rows of a step")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        print(
            "no GPU: torch finds none, so nothing is measured. `--tiny` shows on a CPU that the script works."
        )
        return 2
    scale = TINY if options.tiny else FULL
    started = time.monotonic()
    with process_group():
        result = measure(
            scale, rows=options.rows or scale.rows, left=lambda: LIMIT_S - (time.monotonic() - started)
        )
    print("\n".join(table(result)))
    print(json.dumps(result))
    if result["device"] == "cpu":
        print(NOT_MEASURED)
    return 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Start torch's process group of one process, in which DeepSpeed can start several times."""
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed needs it even with one process
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def measure(scale: Scale, *, rows: int, left: Callable[[], float]) -> dict[str, Any]:
    """Return the figures of all parts.

    Args:
        scale: Sizes.
        rows: Rows of a step.
        left: Returns the seconds until the limit.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    ceiling = matrix_ceiling(scale, device)
    weights = sum(weight.numel() for weight in Decoder(scale.shape).parameters())
    print(f"{name}: ceiling {ceiling:.1f} TFLOP/s; decoder with {weights / 1e6:.1f} M weights", flush=True)
    steps, skipped = [], []
    for case in CASES:
        if left() < RESERVE_S:
            skipped.append(f"{case.name}: no time left")
            continue
        try:
            steps.append(asdict(decoder_step(scale, case, rows=rows, device=device, ceiling=ceiling)))
        except torch.OutOfMemoryError as error:
            skipped.append(f"{case.name}: {str(error).splitlines()[0]}")
        gc.collect()
        torch.cuda.empty_cache()
    onnx, missing = onnx_batches(scale)
    return {
        "device": name if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "weights": weights,
        "length": scale.length,
        "rows": rows,
        "ceiling_teraflops": ceiling,
        "steps": steps,
        "onnx": onnx,
        "not_measured": [*skipped, *missing],
    }


def matrix_ceiling(scale: Scale, device: str) -> float:
    """Return the rate of a square matrix product in TFLOP/s: bf16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    first, second = torch.randn(2, scale.matrix, scale.matrix, device=device, dtype=dtype)
    for _ in range(3):
        first @ second
    repeats, started = 20, clock(device)
    for _ in range(repeats):
        first @ second
    return 2 * scale.matrix**3 * repeats / (clock(device) - started) / 1e12


def decoder_step(scale: Scale, case: Case, *, rows: int, device: str, ceiling: float) -> Step:
    """Measure training steps of one case."""
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes a minute
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    network = Decoder(scale.shape, checkpoint_blocks=case.checkpointing)
    weights = sum(weight.numel() for weight in network.parameters())
    engine, *_ = deepspeed.initialize(
        model=network, config=deepspeed_config(case, rows, device), dist_init_required=False
    )
    draw = torch.Generator().manual_seed(0)
    seconds, loss = [], 0.0
    for _ in range(scale.warm_up + scale.steps):
        tokens = torch.randint(0, 256, (rows, scale.length + 1), generator=draw).to(engine.device)
        started = clock(device)
        logits = engine(tokens[:, :-1]).float().reshape(-1, VOCABULARY)
        step_loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1))
        engine.backward(step_loss)
        engine.step()
        seconds.append(clock(device) - started)
        loss = float(step_loss.detach())
    engine.destroy()
    median = sorted(seconds[scale.warm_up :])[scale.steps // 2]
    shape, tokens_per_s = scale.shape, rows * scale.length / median
    flops = (6 * weights + 12 * shape.depth * shape.width * scale.length) * tokens_per_s / 1e12
    return Step(
        case=case.name,
        seconds=median,
        tokens_per_s=tokens_per_s,
        teraflops=flops,
        utilisation=flops / ceiling,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        loss=loss,
    )


def deepspeed_config(case: Case, rows: int, device: str) -> dict[str, Any]:
    """Return DeepSpeed's configuration: ZeRO 1, or ZeRO 2 with the optimizer on the CPU."""
    zero: dict[str, Any] = {"stage": 1}
    if case.offload:
        zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": device == "cuda"}}
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": device == "cuda" and not case.autocast},
        "torch_autocast": {"enabled": device == "cuda" and case.autocast, "dtype": "bfloat16"},
        "zero_optimization": zero,
        # DeepSpeed's own Adam is compiled at start, which needs a compiler for CUDA.
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1, "torch_adam": True}},
        "steps_per_print": 10**9,
    }


def onnx_batches(scale: Scale) -> tuple[list[dict[str, Any]], list[str]]:
    """Return figures of the ONNX graph for each batch size, and why figures are missing."""
    try:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            graph = write_graph(Path(folder), tiny=scale is TINY)
    except ModuleNotFoundError as error:
        return [], [f"ONNX: {error}"]
    providers = ["CPUExecutionProvider"]
    missing = []
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()  # CUDA's libraries come with torch's wheels
        providers.append("CUDAExecutionProvider")
    else:
        missing.append("ONNX on CUDA: this onnxruntime has no CUDAExecutionProvider; install onnxruntime-gpu")
    sessions = {name: onnxruntime.InferenceSession(graph, providers=[name]) for name in providers}
    used = {name: session.get_providers()[0] for name, session in sessions.items()}
    missing += [f"ONNX on {name}: it does not start here" for name, first in used.items() if first != name]
    started = {name: session for name, session in sessions.items() if used[name] == name}
    return list(_compare(started, scale.batches)), missing


def _compare(sessions: dict[str, Any], batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    width = next(iter(sessions.values())).get_inputs()[0].shape[1]
    for batch in batches:
        matrix = torch.randn(batch, width, generator=draw).numpy()
        scores = {}
        for name, session in sessions.items():
            scores[name] = session.run(["scores"], {"inputs": matrix})[0]
            started, repeats = time.perf_counter(), 20
            for _ in range(repeats):
                session.run(["scores"], {"inputs": matrix})
            yield {
                "provider": name,
                "rows": batch,
                "ms": (time.perf_counter() - started) / repeats * 1000,
                "largest_score_difference": float(abs(scores[name] - scores["CPUExecutionProvider"]).max()),
            }


def write_graph(folder: Path, *, tiny: bool) -> bytes:
    """Return the ONNX graph of an FT-Transformer with 24 numbers, and the paper's default size."""
    from cluster.runtime import InputSpec, ModelSignature, Task
    from jobs.train.ft_transformer.family import Parameters, build, export
    from tests.samples.row_signature import row_signature

    inputs = tuple(InputSpec(name=f"x{index}", dtype="double") for index in range(24))
    signature = row_signature(ModelSignature(task=Task.binary, inputs=inputs, label="y", classes=(0, 1)))
    parameters = Parameters(width=16, heads=2) if tiny else Parameters(width=192, depth=3, heads=8)
    torch.manual_seed(0)
    network = build(signature, parameters).eval()
    export(network, signature, parameters, folder, torch.randn(8, 24).numpy())
    return (folder / "model.onnx").read_bytes()


def clock(device: str) -> float:
    """Return the time in seconds, after the GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the result as lines of text."""
    yield f"{'step':36} {'ms':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'of ceiling':>10} {'peak GiB':>9}"
    for step in result["steps"]:
        peak = "-" if step["peak_gib"] is None else f"{step['peak_gib']:.2f}"
        yield (
            f"{step['case']:36} {step['seconds'] * 1000:9.1f} {step['tokens_per_s']:10.0f} {step['teraflops']:8.2f} "
            f"{step['utilisation']:10.1%} {peak:>9}"
        )
    for figures in result["onnx"]:
        yield (
            f"ONNX, {figures['rows']} rows, {figures['provider']}: {figures['ms']:.3f} ms, scores differ by at most "
            f"{figures['largest_score_difference']:.1e}"
        )
    yield from (f"not measured: {reason}" for reason in result["not_measured"])


if __name__ == "__main__":
    sys.exit(main())
