"""The decoder: documents in a row do not see each other, its files, and that it learns more than pairs of bytes."""

from __future__ import annotations

import math
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.registry import Lineage, Registry
from cluster.runtime import load_model
from cluster.runtime.loader import load_signature
from cluster.runtime.signature import LANGUAGE_MODEL
from cluster.security.keys.keyring import Keyring
from cluster.storage import Layout
from jobs.promotion.exporting import find_source
from jobs.train.decoder.config import TextSplitConfig, TrainTextConfig
from jobs.train.decoder.corpus import Parts, read_corpus, split_corpus
from jobs.train.decoder.evaluation import Bigram, bits_per_byte
from jobs.train.decoder.family import Parameters, TextSignature, build, export, loss, read_model
from jobs.train.decoder.network import (
    DOCUMENT,
    IGNORED,
    VOCABULARY,
    Decoder,
    find_documents,
    rotary_angles,
    rotate,
)
from jobs.train.decoder.rows import PackedRows

PARAMETERS = Parameters(width=32, depth=2, heads=2, length=64)


def network(parameters: Parameters = PARAMETERS) -> Decoder:
    torch.manual_seed(0)
    return build(TextSignature(), parameters).eval()


def text_rows(count: int, length: int) -> torch.Tensor:
    """Return random bytes without document boundaries."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, length)))


def test_each_document_of_a_row_is_read_as_if_it_were_alone() -> None:
    """Positions start again, and no token attends to another document or to a later token."""
    model, tokens = network(), text_rows(1, 40)
    tokens[0, [9, 10, 25]] = DOCUMENT
    with torch.no_grad():
        packed = model(tokens)
        for start, stop in ((0, 9), (9, 10), (10, 25), (25, 40), (10, 18)):
            alone = model(tokens[:, start:stop])
            assert torch.allclose(packed[:, start:stop], alone, atol=1e-5)
        other = tokens.clone()
        other[0, 12] = (other[0, 12] + 1) % 256
        changed = (model(other) - packed).abs().amax(2)[0] > 1e-6
    assert changed.tolist() == [12 <= place < 25 for place in range(40)]


def test_positions_and_mask_of_a_row() -> None:
    """A row without a boundary has no mask, so that attention uses its causal kernel."""
    layout = find_documents(torch.tensor([[1, 2, DOCUMENT, 3], [DOCUMENT, 4, 5, 6]]))
    assert layout.positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert layout.mask is not None
    assert layout.mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert layout.mask[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    alone = find_documents(torch.tensor([[DOCUMENT, 1, 2], [3, 4, 5]]))
    assert alone.mask is None
    assert alone.positions.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_a_rotation_keeps_only_the_distance() -> None:
    """The product of a rotated query and key depends on the distance of their positions (RoFormer, equation 16)."""
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(first: int, second: int) -> float:
        rotated = [
            rotate(vector, rotary_angles(torch.tensor([[place]]), 8, dtype=torch.float32))
            for vector, place in ((query, first), (key, second))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert math.isclose(product(7, 3), product(104, 100), rel_tol=1e-4)
    assert math.isclose(product(0, 0), float((query * key).sum()), rel_tol=1e-5)
    assert not math.isclose(product(7, 3), product(7, 5), rel_tol=1e-2)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    """With dropout, too: the second computation of a block draws the same random numbers."""
    tokens = text_rows(2, 16)
    tokens[0, 5] = DOCUMENT
    gradients = []
    for checkpoint_blocks in (False, True):
        model = network(replace(PARAMETERS, dropout=0.2)).train()
        if checkpoint_blocks:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        loss(model(tokens), tokens, TextSignature()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_a_position_without_a_next_token_has_no_loss() -> None:
    """An untrained network needs about log2(257) bits for a token."""
    tokens = text_rows(2, 16)
    target = tokens.roll(-1, 1)
    target[:, -1] = IGNORED
    logits = network()(tokens)
    known = loss(logits[:, :-1], target[:, :-1], TextSignature()).detach()
    assert torch.isclose(loss(logits, target, TextSignature()).detach() * 16, known * 15)
    assert abs(float(known) - math.log(VOCABULARY)) < 0.1


def test_the_files_of_a_version_rebuild_the_network(tmp_path: Path) -> None:
    """A version has safetensors and JSON only. Whatever scores rows of a table refuses it in one line."""
    model, folder = network(), tmp_path / "m"
    folder.mkdir()
    export(model, TextSignature(), PARAMETERS, folder, None)
    with torch.no_grad():
        assert torch.equal(read_model(folder).eval()(text_rows(1, 8)), model(text_rows(1, 8)))
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    registry = Registry(ledger, Layout(str(tmp_path)))
    keyring = Keyring.create(tmp_path / "keyring.json", b"k" * 32)
    version = registry.register(
        folder,
        name="m",
        family="decoder",
        task=LANGUAGE_MODEL,
        lineage=Lineage(),
        metrics={},
        store=keyring,
        actor="a",
    )
    assert set(version.files) == {"decoder.json", "model.safetensors"}
    message = r"^m version 1 is a language model \(family decoder\)\. .* cannot be deployed"
    for refused in (
        lambda: load_model(version, keyring),
        lambda: load_signature(version, keyring),
        lambda: find_source(ledger, version),
    ):
        with pytest.raises(RefusedError, match=message):
            refused()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"width": 36, "heads": 4}, r"model\.width must be a multiple of 2 · model\.heads, got 36 and 4"),
        ({"length": 1}, r"model\.length must be at least 2"),
        ({"batch_size": 0}, r"model\.batch_size must be at least 1"),
        ({"dropout": 1.0}, r"model\.dropout must be between 0 and 1"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, float], message: str) -> None:
    """The message names the parameter and its value."""
    with pytest.raises(ValueError, match=message):
        Parameters(**parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a b"}, "name must be letters, digits"),
        ({"validation_share": 0.95}, "validation_share must be between 0 and 0.9"),
        ({"evaluated_rows": 0}, "evaluated_rows must be at least 1"),
        ({"run": "a/b"}, "run must be letters, digits"),
        ({"seed": -1}, "seed must be between 0"),
    ],
)
def test_wrong_options_of_a_text_run_are_refused(options: dict[str, Any], message: str) -> None:
    """When the configuration is loaded, before files are read."""
    with pytest.raises(ValueError, match=message):
        TrainTextConfig(**({"name": "m", "text": "docs"} | options))
    with pytest.raises(ValueError, match=r"split\.remainder must be 0-9, got 10"):
        TextSplitConfig(remainder=10)


def test_a_bigram_model_predicts_what_it_counted(tmp_path: Path) -> None:
    """After `a` always comes `b` or the end. Smoothing gives each other token some probability."""
    (tmp_path / "1").write_text("ab" * 500)
    bigram = Bigram(read_corpus(str(tmp_path)))

    def bits(text: str) -> float:
        (tmp_path / "other").write_text(text)
        rows = PackedRows(read_corpus(str(tmp_path / "other")), length=50)
        every_second = bigram.bits_per_byte(rows, batch_size=3, max_rows=len(rows) // 2)
        assert every_second == pytest.approx(bigram.bits_per_byte(rows, batch_size=7), abs=0.2)
        return every_second

    assert 0 < bits("ab" * 500) < 0.15
    assert bits("ba" * 500) < 0.4
    assert bits("xy" * 500) > 7


def standard_library() -> Parts:
    """Return the modules of Python's standard library, without packages."""
    corpus = read_corpus(f"{sysconfig.get_paths()['stdlib']}/*.py")
    return split_corpus(corpus, modulo=4, remainder=3, validation_share=0.1)


def test_the_decoder_beats_a_bigram_model_on_held_out_files() -> None:
    """It needs fewer bits for a byte of files of Python's standard library that it has never seen."""
    parts = standard_library()
    torch.manual_seed(0)
    parameters = Parameters(width=64, depth=2, heads=4, length=128, batch_size=8, learning_rate=0.005)
    model, steps = build(TextSignature(), parameters), 250
    rows = PackedRows(parts.fit, length=parameters.length, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=parameters.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
    )
    for step in range(steps):
        batch = rows.batch(0, step * parameters.batch_size, (step + 1) * parameters.batch_size)
        step_loss = loss(
            model(torch.from_numpy(batch.inputs)), torch.from_numpy(batch.target), TextSignature()
        )
        optimizer.zero_grad()
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    held_out = PackedRows(parts.held_out, length=parameters.length)
    decoder = bits_per_byte(model, held_out, batch_size=32, max_rows=1000)
    assert decoder < Bigram(parts.fit).bits_per_byte(held_out, batch_size=32, max_rows=1000) - 0.1
