"""Fit a decoder to text files, and evaluate it on the held-out files, in the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jobs.train.decoder.batches import EVALUATION_ROWS, TextBatches
from jobs.train.decoder.corpus import Corpus, Parts
from jobs.train.decoder.evaluation import Bigram, bits_per_byte
from jobs.train.decoder.family import Parameters, TextSignature, read_model
from jobs.train.decoder.rows import PackedRows
from jobs.train.families import FitContext, ResolvedFamily
from jobs.train.network.fit import plan_fit, run_fit


def describe_text(corpus: Corpus, parts: Parts) -> str:
    """Return the description of a corpus and its split."""
    files = [len(part.documents) for part in (parts.fit, parts.validation, parts.held_out)]
    return (
        f"{len(corpus.documents)} files, {corpus.num_bytes} bytes: {files[0]} files to fit on, {files[1]} to choose "
        f"the best epoch, {files[2]} held out (by the hash of their content)"
    )


def fit_text(parts: Parts, family: ResolvedFamily, context: FitContext) -> None:
    """Train on the workers, continuing from the run's last checkpoint, and write the files of the best epoch.

    Raises:
        ConfigError: There are fewer rows than workers, or the workers do not divide the batch.
        TrainingFailed: The fit diverged, or the device has too little memory.
    """
    batches = TextBatches(parts=parts, length=family.parameters.length)
    network_fit = plan_fit(
        family,
        context,
        signature=TextSignature(),
        batches=batches,
        num_rows=batches.num_rows,
        num_workers=context.scaling.num_workers,
    )
    run_fit(network_fit, sample=np.empty((0, 0), np.float32))


def evaluate_text(folder: Path, parts: Parts, parameters: Parameters, *, max_rows: int) -> dict[str, Any]:
    """Return the bits per byte of a fitted decoder and of the bigram model, on the same held-out rows."""
    rows = PackedRows(parts.held_out, length=parameters.length)
    network = read_model(folder)
    return {
        "bits_per_byte": bits_per_byte(network, rows, batch_size=EVALUATION_ROWS, max_rows=max_rows),
        "bigram_bits_per_byte": Bigram(parts.fit).bits_per_byte(
            rows, batch_size=EVALUATION_ROWS, max_rows=max_rows
        ),
        "rows": min(max_rows, len(rows)),
        "held_out_files": len(parts.held_out.documents),
    }


def text_warnings(metrics: dict[str, Any]) -> list[str]:
    """Return warnings about a fitted decoder, one sentence each."""
    if metrics["bits_per_byte"] < metrics["bigram_bits_per_byte"]:
        return []
    return ["the decoder is not better than a bigram model on the held-out files: train it for longer"]
