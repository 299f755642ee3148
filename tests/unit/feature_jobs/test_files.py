"""A view's source files: found in order, read whole, or refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import SourceError
from cluster.storage import Layout
from feature_jobs.store import FileSource
from feature_jobs.store.ingestion.files import SourceFiles, head, open_source


def opened(path: str | Path, root: str = "", **options: Any) -> SourceFiles:
    return open_source(FileSource(str(path), event_timestamp="at", **options), Layout(root))


def parquet(path: Path, *values: int) -> Path:
    """A file of one column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": pa.array(values, pa.int64())}), path)
    return path


def test_glob_and_folder_give_the_same_batch(tmp_path: Path) -> None:
    """The files in the order of their names, however they are named."""
    for name, values in (("b", (3,)), ("a", (1, 2))):
        parquet(tmp_path / "in" / f"{name}.parquet", *values)
    (tmp_path / "in" / "notes.txt").write_text("not data")
    found = [opened(tmp_path / path) for path in ("in", "in/*.parquet")]
    assert (found[0].paths, found[0].digest) == (found[1].paths, found[1].digest)
    assert ([Path(path).name for path in found[0].paths], found[0].rows) == (["a.parquet", "b.parquet"], 3)


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    """The same rows under another name are the same batch; one more row is another."""
    one, copy = parquet(tmp_path / "one.parquet", 1, 2), parquet(tmp_path / "copy.parquet", 1, 2)
    other = parquet(tmp_path / "other.parquet", 1, 2, 3)
    digests = [opened(path).digest for path in (one, copy, other)]
    assert digests[0] == digests[1] != digests[2]


def test_storage_stands_for_the_storage_root(tmp_path: Path) -> None:
    """A definition need not know where state lies."""
    parquet(tmp_path / "source" / "x.parquet", 1)
    assert opened("{storage}/source/x.parquet", str(tmp_path)).rows == 1


def test_source_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    """Missing, unmatched, or no Parquet at all."""
    (tmp_path / "text.parquet").write_text("not parquet")
    whole = parquet(tmp_path / "whole.parquet", *range(1000)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    for name, words in (
        ("none.parquet", "No Parquet file"),
        ("*.csv", "No CSV file"),
        ("text.parquet", "cannot be read"),
        ("cut.parquet", "cannot be read"),
    ):
        with pytest.raises(SourceError, match=words):
            opened(tmp_path / name)


def test_rows_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """The footer is whole, a page is not."""
    path = parquet(tmp_path / "page.parquet", *range(1000))
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    with pytest.raises(SourceError, match="cannot be read"):
        head(str(path), 10, FileSource(str(path), event_timestamp="at"))


def test_partition_folders_are_part_of_a_batch_where_they_give_it_columns(tmp_path: Path) -> None:
    """The same file of two days is two batches; a folder that nothing is declared of changes nothing."""
    paths = [parquet(tmp_path / f"dt=2026-01-0{day}" / "x.parquet", 1) for day in (1, 2)]

    def digests(*declared: str) -> list[str]:
        sources = [FileSource(str(path), event_timestamp="at") for path in paths]
        return [open_source(one, Layout(""), declared=declared).digest for one in sources]

    assert len({*digests("dt"), *digests()}) == 3
    assert digests("n", "day") == digests()
