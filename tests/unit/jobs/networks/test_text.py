"""Text files as packed rows: which files, which part, which tokens, and in which order."""

from __future__ import annotations

import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import TrainingSetError
from jobs.train.decoder.corpus import Corpus, read_corpus, split_corpus
from jobs.train.decoder.network import DOCUMENT, IGNORED
from jobs.train.decoder.order import RandomOrder
from jobs.train.decoder.rows import PackedRows


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def stream(corpus: Corpus, folder: Path) -> list[int]:
    """Return all tokens of a corpus, read file by file."""
    tokens = []
    for document in corpus.documents:
        tokens += [DOCUMENT, *(folder / Path(document.path).name).read_bytes()]
    return tokens


def test_a_folder_a_pattern_and_a_file_are_read(tmp_path: Path) -> None:
    """A folder with all files below it, in the order of their paths. Empty files are left out."""
    folder = write(tmp_path / "texts", b="bb", a="a", empty="")
    write(folder / "deeper", c="c")
    (folder / "a.md").write_text("# a")

    def names(text: str) -> list[str]:
        return [str(Path(document.path).relative_to(folder)) for document in read_corpus(text).documents]

    assert names(str(folder)) == ["a.md", "a.txt", "b.txt", "deeper/c.txt"]
    assert names(f"{folder}/**/*.txt") == ["a.txt", "b.txt", "deeper/c.txt"]
    assert names(f"{folder}/b.txt") == ["b.txt"]


def test_hidden_files_and_the_storage_root_are_not_read(tmp_path: Path) -> None:
    """A folder named by the caller may be hidden itself."""
    folder = write(tmp_path / ".notes", a="a")
    (folder / ".env").write_text("password")
    write(folder / ".git", config="config")
    write(folder / "state", key="key")
    for text in (str(folder), f"{folder}/**"):
        corpus = read_corpus(text, excluded=[str(folder / "state")])
        assert [Path(document.path).name for document in corpus.documents] == ["a.txt"]


def test_files_of_another_file_system_are_read(tmp_path: Path) -> None:
    """Any URI of fsspec."""
    memory = fsspec.filesystem("memory")
    memory.pipe({"/texts/one.txt": b"first", "/texts/two.txt": b"second"})
    try:
        corpus = read_corpus("memory://texts")
        assert corpus.num_bytes == 11
        batch = PackedRows(corpus, length=20).in_order(0, 1)
        assert bytes(batch.inputs[0, 1:6].astype(np.uint8)) == b"first"
    finally:
        memory.rm("/texts", recursive=True)


@pytest.mark.parametrize("text", ["missing", "texts/*.md", "texts/empty.txt"])
def test_no_text_is_refused(tmp_path: Path, text: str) -> None:
    """The message names the option and its value."""
    write(tmp_path / "texts", empty="")
    with pytest.raises(TrainingSetError, match=r"text=.* has no files with text"):
        read_corpus(str(tmp_path / text))


def test_copies_of_a_file_are_in_the_same_part(tmp_path: Path) -> None:
    """The content decides, not the name. A part without files is refused."""
    folder = write(tmp_path, **{f"file{n}": f"text {n % 40}" for n in range(80)})
    corpus = read_corpus(str(folder))
    parts = split_corpus(corpus, modulo=4, remainder=3, validation_share=0.2)
    contents = [{document.sha256 for document in part.documents} for part in (parts.fit, parts.validation)]
    contents.append({document.sha256 for document in parts.held_out.documents})
    assert sum(map(len, contents)) == len(set.union(*contents)) == 40
    sizes = [len(part.documents) for part in (parts.fit, parts.validation, parts.held_out)]
    assert sum(sizes) == 80
    assert all(sizes)
    with pytest.raises(TrainingSetError, match=r"no training files of 1\. Add files"):
        split_corpus(
            Corpus(uri=corpus.uri, documents=corpus.documents[:1]),
            modulo=4,
            remainder=0,
            validation_share=0.9,
        )


def test_the_hash_of_a_corpus_depends_on_contents_only(tmp_path: Path) -> None:
    """It is the same in another folder, and another one after a change of a byte."""
    first = read_corpus(str(write(tmp_path / "1", a="text", b="more"))).hash
    assert read_corpus(str(write(tmp_path / "2", a="text", b="more"))).hash == first
    assert read_corpus(str(write(tmp_path / "2", b="mora"))).hash != first


@given(
    texts=st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=6), length=st.integers(1, 12)
)
def test_rows_are_the_stream_cut_into_pieces(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], length: int
) -> None:
    """Each target is the next token. The last row is filled up with documents that have no target."""
    folder = write(tmp_path_factory.mktemp("texts"), **{f"{n}": text for n, text in enumerate(texts)})
    corpus = read_corpus(str(folder))
    tokens = stream(corpus, folder)
    rows = PackedRows(corpus, length=length)
    inputs, target = rows.in_order(0, len(rows))
    assert inputs.shape == target.shape == (len(rows), length)
    flat = target.ravel()
    assert inputs.ravel()[flat != IGNORED].tolist() == tokens[:-1]
    assert flat[flat != IGNORED].tolist() == tokens[1:]
    padding = inputs.ravel()[len(tokens) :]
    assert (padding == DOCUMENT).all()


def test_a_batch_depends_on_seed_epoch_and_position_only(tmp_path: Path) -> None:
    """Small batches are the parts of a large one, another process reads the same, and an epoch has each row once."""
    corpus = read_corpus(str(write(tmp_path, **{f"f{n}": f"{n} " * n for n in range(1, 30)})))
    rows = PackedRows(corpus, length=16, seed=5)
    whole = rows.batch(3, 0, len(rows))
    parts = [pickle.loads(pickle.dumps(rows)).batch(3, n, n + 1) for n in range(len(rows))]  # noqa: S301
    assert np.array_equal(whole.inputs, np.concatenate([part.inputs for part in parts]))
    assert np.array_equal(whole.target, np.concatenate([part.target for part in parts]))
    in_order = rows.in_order(0, len(rows)).inputs
    assert sorted(map(bytes, whole.inputs)) == sorted(map(bytes, in_order))
    for other in (rows.batch(4, 0, len(rows)), PackedRows(corpus, length=16, seed=6).batch(3, 0, len(rows))):
        assert not np.array_equal(other.inputs, whole.inputs)


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    """The message names the file."""
    folder = write(tmp_path, a="a" * 100)
    rows = PackedRows(read_corpus(str(folder)), length=50)
    (folder / "a.txt").write_text("a")
    with pytest.raises(TrainingSetError, match=r"a\.txt has become shorter"):
        rows.batch(0, 0, len(rows))


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 50))
def test_an_order_has_each_sample_once(size: int, seed: int, epoch: int) -> None:
    """A permutation, also if the number of samples is no power of two."""
    order = RandomOrder(size, seed=seed, epoch=epoch)
    samples = order.samples(0, size)
    assert np.array_equal(np.sort(samples), np.arange(size))
    assert np.array_equal(order.samples(size // 3, size), samples[size // 3 :])


def test_an_order_of_a_trillion_samples_needs_no_memory() -> None:
    """Only the asked positions are computed. Positions outside are refused."""
    order = RandomOrder(10**12, seed=0, epoch=0)
    samples = order.samples(10**12 - 1000, 10**12)
    assert len(np.unique(samples)) == 1000
    assert 0.4e12 < samples.mean() < 0.6e12
    with pytest.raises(ValueError, match="not within 0 to"):
        order.samples(10**12, 10**12 + 1)


def test_an_order_is_random() -> None:
    """Neighbours in the order are not neighbours in the corpus, and each sample can be anywhere."""
    samples = RandomOrder(4096, seed=1, epoch=0).samples(0, 4096).astype(np.float64)
    assert abs(np.corrcoef(samples, np.arange(4096))[0, 1]) < 0.06
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.06
    places = [int(RandomOrder(64, seed=seed, epoch=0).samples(0, 1)[0]) for seed in range(2000)]
    counts = np.bincount(places, minlength=64)
    assert (
        (counts - 2000 / 64) ** 2 / (2000 / 64)
    ).sum() < 120  # chi-squared with 63 degrees of freedom: p = 2e-5
