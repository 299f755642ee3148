"""Tests of paths, atomic writes, Parquet and JSON files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.errors import ConfigError
from cluster.settings import StorageConfig
from cluster.storage import write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure before the rename keeps the old content and leaves no temporary file."""
    target = tmp_path / "a" / "file"
    storage.write_bytes(str(target), b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("root", ["local", "memory://bucket"])
def test_parquet_and_bytes_round_trip_on_any_file_system(tmp_path: Path, root: str) -> None:
    """The same calls work on a folder and on an fsspec URI."""
    base = str(tmp_path) if root == "local" else root
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    size = storage.write_parquet(table, f"{base}/t/part.parquet")
    assert storage.read_parquet(f"{base}/t/part.parquet").equals(table)
    assert storage.read_parquet(f"{base}/t/part.parquet", columns=["b"]).column_names == ["b"]
    assert size == len(storage.read_bytes(f"{base}/t/part.parquet"))
    [uri] = storage.list_files(f"{base}/t", ".parquet")
    assert storage.read_parquet(uri).equals(table)


def test_relative_paths_start_at_the_project_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable wins. Without it, the nearest folder upwards with a cluster's record counts."""
    monkeypatch.setenv(storage.ROOT_VARIABLE, str(tmp_path / "recorded"))
    assert storage.resolve("data/x.parquet") == str(tmp_path / "recorded" / "data" / "x.parquet")
    monkeypatch.delenv(storage.ROOT_VARIABLE)
    (tmp_path / ".falaj").mkdir()
    (tmp_path / ".falaj" / "cluster.json").write_text("{}")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert storage.layout(StorageConfig()).root == str(tmp_path / ".falaj")
    assert storage.resolve("s3://bucket/x") == "s3://bucket/x"


def test_remote_path_is_refused_for_local_state() -> None:
    with pytest.raises(ConfigError, match="local disk"):
        storage.local("s3://bucket/models")


def test_floats_and_times_are_written_without_a_dictionary(tmp_path: Path) -> None:
    """Their values rarely repeat. Text and integers keep theirs."""
    at = pa.array([0, 0], pa.timestamp("us", "UTC"))
    table = pa.table({"amount": [0.5, 0.5], "at": at, "sector": ["x", "x"], "code": [1, 1]})
    storage.write_parquet(table, f"{tmp_path}/t.parquet")
    group = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0)
    coded = [group.column(at).path_in_schema for at in range(4) if group.column(at).has_dictionary_page]
    assert coded == ["sector", "code"]
    assert storage.read_parquet(f"{tmp_path}/t.parquet").equals(table)


def test_json_has_null_for_non_finite_numbers(tmp_path: Path) -> None:
    """Other tools cannot read a file with NaN."""
    content = {"a": [1.5, float("nan"), (float("inf"), 2)], "b": {"c": float("-inf")}, "d": "nan"}
    write_json(str(tmp_path / "f.json"), content)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content_read = json.loads((tmp_path / "f.json").read_text(), parse_constant=refuse)
    assert content_read == {"a": [1.5, None, [None, 2]], "b": {"c": None}, "d": "nan"}


def test_a_file_name_of_any_text_stays_in_its_folder() -> None:
    """Different texts get different names, and ordinary names stay unchanged."""
    texts = ["challenger", "v2-b_1.x", "../zz", "..", ".", "a/b", "a%2Fb", "a\\b", "é", "a b", "\x00"]
    names = [storage.file_name(text) for text in texts]
    assert names[:2] == texts[:2]
    assert len(set(names)) == len(texts)
    for name in names:
        assert Path("/folder", name).resolve().parent == Path("/folder")
