"""A view's source files are found in order and read completely, or refused with a reason."""

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


def open_path(path: str | Path, root: str = "", **options: Any) -> SourceFiles:
    return open_source(FileSource(str(path), event_timestamp="at", **options), Layout(root))


def parquet(path: Path, *values: int) -> Path:
    """Write a file with one column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": pa.array(values, pa.int64())}), path)
    return path


def test_glob_and_folder_give_the_same_batch(tmp_path: Path) -> None:
    """The files are sorted by name, and files of other formats are left out."""
    for name, values in (("b", (3,)), ("a", (1, 2))):
        parquet(tmp_path / "in" / f"{name}.parquet", *values)
    (tmp_path / "in" / "notes.txt").write_text("not data")
    folder, glob = (open_path(tmp_path / path) for path in ("in", "in/*.parquet"))
    assert (folder.paths, folder.digest) == (glob.paths, glob.digest)
    assert ([Path(path).name for path in folder.paths], folder.rows) == (["a.parquet", "b.parquet"], 3)


def test_digest_depends_only_on_the_content(tmp_path: Path) -> None:
    """The same rows under another name are the same batch; one more row makes another batch."""
    first, copy = parquet(tmp_path / "first.parquet", 1, 2), parquet(tmp_path / "copy.parquet", 1, 2)
    other = parquet(tmp_path / "other.parquet", 1, 2, 3)
    digests = [open_path(path).digest for path in (first, copy, other)]
    assert digests[0] == digests[1] != digests[2]


def test_storage_stands_for_the_storage_root(tmp_path: Path) -> None:
    """So a definition does not contain the path of the storage root."""
    parquet(tmp_path / "source" / "x.parquet", 1)
    assert open_path("{storage}/source/x.parquet", str(tmp_path)).rows == 1


def test_missing_or_unreadable_source_is_refused(tmp_path: Path) -> None:
    """The path is missing, the glob matches nothing, or the file is not valid Parquet."""
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
            open_path(tmp_path / name)


def test_file_with_a_damaged_page_is_refused(tmp_path: Path) -> None:
    """Its footer is intact, so the damage shows only when rows are read."""
    path = parquet(tmp_path / "page.parquet", *range(1000))
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    with pytest.raises(SourceError, match="cannot be read"):
        head(str(path), 10, FileSource(str(path), event_timestamp="at"))


def test_digest_includes_partition_folders_of_declared_columns(tmp_path: Path) -> None:
    """The same file in the folders of two days is two batches. A folder of an undeclared column changes nothing."""
    paths = [parquet(tmp_path / f"dt=2026-01-0{day}" / "x.parquet", 1) for day in (1, 2)]

    def digests(*declared: str) -> list[str]:
        sources = [FileSource(str(path), event_timestamp="at") for path in paths]
        return [open_source(source, Layout(""), declared=declared).digest for source in sources]

    assert len({*digests("dt"), *digests()}) == 3
    assert digests("n", "day") == digests()
